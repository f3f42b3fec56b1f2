"""Panoptic segmentation by Mask2Former, MaskFormer or DETR trained on COCO's 133 classes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForUniversalSegmentation

from data_prep import coco_panoptic, label_maps
from data_prep.extract.pool import boxes_of_masks
from data_prep.schema import MAP_VOID, DataError, Record

MODELS = ("detr", "mask2former", "maskformer")
_SURE = 0.8  # OBJECT_MASK_THRESHOLD and OVERLAP_THRESHOLD of Mask2Former on COCO
_OVERLAP = 0.8


class Segmenter:
    """Segments photographs one by one or in batches of equal size, so that no result depends on its neighbours."""

    def __init__(self, name: str, device: torch.device, *, regions: int, region_score: float, seg_map: str):
        """Loads the model `name`; see `Settings` for the rest. Raises DataError for a model of another kind."""
        self._processor = AutoImageProcessor.from_pretrained(name, backend="pil", trust_remote_code=False)
        self._model = AutoModelForUniversalSegmentation.from_pretrained(name, trust_remote_code=False).eval().to(device)
        config = self._model.config
        if config.model_type not in MODELS:
            raise DataError(f"segmenter {name}: expected one of {', '.join(MODELS)}, found {config.model_type}")
        self._device, self._regions, self._region_score, self._seg_map = device, regions, region_score, seg_map
        self._classes = classes_of_labels(config.id2label, name)

    def __call__(self, images: Sequence[Image.Image]) -> list[Record]:
        """Segments images into seg_semantic, seg_map, categories, and boxes, box_classes, box_scores of each region."""
        pixels = [self._pixels(image) for image in images]
        groups: dict[tuple[int, ...], list[int]] = {}
        for place, array in enumerate(pixels):
            groups.setdefault(tuple(array.shape), []).append(place)
        records: dict[int, Record] = {}
        for places in groups.values():
            batch = torch.stack([pixels[place] for place in places]).to(self._device)
            with torch.inference_mode():
                outputs = self._model(pixel_values=batch)
            logits, masks = _queries(outputs)
            for place, query_logits, query_masks in zip(places, logits, masks, strict=True):
                records[place] = self._record(query_logits.float(), query_masks.float())
        return [records[place] for place in range(len(images))]

    def _pixels(self, image: Image.Image) -> torch.Tensor:
        inputs = self._processor(images=image, return_tensors="pt")
        if "pixel_mask" in inputs and not inputs["pixel_mask"].bool().all():
            raise DataError("segmenter: its processor pads single images; set do_pad or pad_size so that it does not")
        return inputs["pixel_values"][0]

    def _record(self, logits: torch.Tensor, masks: torch.Tensor) -> Record:
        """Fields of one image from its queries' class logits [Q, labels + 1] and mask logits [Q, h, w]."""
        classes = class_probabilities(logits, self._classes)
        scores = semantic_scores(classes, masks)
        labels = panoptic_labels(classes, masks) if self._seg_map == "panoptic" else scores.argmax(0).to(torch.uint8)
        pooled = torch.nn.functional.adaptive_avg_pool2d(scores, label_maps.CELLS)
        best, index = classes.max(1)
        chosen = choose(
            best.cpu().numpy(), (masks > 0).flatten(1).any(1).cpu().numpy(), self._regions, self._region_score
        )
        return label_maps.fields(labels.cpu().numpy(), coco_panoptic.CLASSES) | {
            "seg_semantic": pooled.cpu().numpy(),
            "boxes": boxes_of_masks((masks[chosen] > 0).cpu().numpy()),
            "box_classes": index[chosen].to(torch.int32).cpu().numpy(),
            "box_scores": best[chosen].cpu().numpy(),
        }


def classes_of_labels(id2label: Mapping[int, str], name: str) -> np.ndarray:
    """Class 0..132 of each label of a model [labels], -1 for none, by name.

    A label called LABEL_n is class n of a model with 133 labels, else COCO's category id n: DETR's panoptic models
    count so. Raises DataError when a class of COCO has no label.
    """
    of_name = {label: index for index, label in enumerate(coco_panoptic.NAMES)}
    classes = np.full(max(id2label) + 1, -1)
    for number, label in id2label.items():
        unnamed = re.fullmatch(r"LABEL_(\d+)", label)
        if unnamed is None:
            classes[number] = of_name.get(label, -1)
        elif len(id2label) == coco_panoptic.CLASSES:
            classes[number] = int(unnamed[1])
        else:
            classes[number] = coco_panoptic.CLASS_OF_ID.get(int(unnamed[1]), -1)
    missing = sorted(set(range(coco_panoptic.CLASSES)) - set(classes.tolist()))
    if missing:
        raise DataError(
            f"segmenter {name}: expected the {coco_panoptic.CLASSES} classes of COCO's panoptic task among its "
            f"{len(id2label)} labels, found {len(missing)} missing, such as {coco_panoptic.NAMES[missing[0]]!r}"
        )
    return classes


def class_probabilities(logits: torch.Tensor, classes: np.ndarray) -> torch.Tensor:
    """Softmax of query logits [Q, labels + 1], the last for no object, as [Q, 133]."""
    probabilities = logits.softmax(-1)[:, : len(classes)]
    known = np.flatnonzero(classes >= 0)
    out = probabilities.new_zeros(len(logits), coco_panoptic.CLASSES)
    return out.index_add(1, torch.as_tensor(classes[known], device=out.device), probabilities[:, known])


def semantic_scores(classes: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Probability of each class at each pixel [133, h, w], from class probabilities [Q, 133] and mask logits [Q, h, w].

    Semantic inference of MaskFormer (Cheng et al., 2021, section 3.4): each query votes for its classes by its mask;
    divided by the sum over classes, as the softmax of a semantic head is.
    """
    scores = torch.einsum("qc,qhw->chw", classes, masks.sigmoid())
    return scores / scores.sum(0).clamp_min(torch.finfo(scores.dtype).tiny)


def panoptic_labels(classes: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Class of each pixel [h, w] uint8, 255 where no query is sure: panoptic inference of MaskFormer (section 3.4).

    A pixel goes to the sure query whose score times mask is largest, if that mask covers it; a query that keeps less
    than 0.8 of its mask so is left out. (transformers' own function gives every pixel to some segment.)
    """
    labels = torch.full(masks.shape[1:], MAP_VOID, dtype=torch.uint8, device=masks.device)
    scores, index = classes.max(1)
    sure = scores > _SURE
    if not sure.any():
        return labels
    probabilities = masks[sure].sigmoid()
    owner = (scores[sure, None, None] * probabilities).argmax(0)
    for query, class_number in enumerate(index[sure].tolist()):
        owned, covered = owner == query, probabilities[query] >= 0.5
        if owned.sum() >= _OVERLAP * covered.sum():
            labels[owned & covered] = class_number
    return labels


def choose(scores: np.ndarray, seen: np.ndarray, most: int, least_score: float) -> list[int]:
    """Queries that become regions: the most confident whose mask is not empty, at least one.

    scores: confidence of each query [Q]; seen: whether its mask has a pixel [Q].
    """
    order = np.argsort(-scores, kind="stable").tolist()
    chosen = [query for query in order if seen[query] and scores[query] >= least_score][:most]
    return chosen or [next((query for query in order if seen[query]), order[0])]


def _queries(outputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Class and mask logits of each query, under the names that the models give them."""
    if "class_queries_logits" in outputs:
        return outputs.class_queries_logits, outputs.masks_queries_logits
    return outputs.logits, outputs.pred_masks
