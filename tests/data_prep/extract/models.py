"""Tiny models of the kinds that extraction loads, with random weights, and photographs that scikit-image ships."""

import json
from pathlib import Path

import skimage.data
from PIL import Image

PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket")
LABELS = 250  # of DETR's panoptic models


def write_photographs(folder: Path) -> list[str]:
    """Four photographs of three sizes as JPEG; returns their names."""
    for name in PHOTOGRAPHS:
        Image.fromarray(getattr(skimage.data, name)()).resize((96, 64) if name != "astronaut" else (64, 64)).save(
            folder / f"{name}.jpg", quality=95
        )
    return [f"{name}.jpg" for name in PHOTOGRAPHS]


def write_models(folder: Path, torch, transformers) -> dict[str, str]:
    """Saves the models; returns the folder of each kind."""
    torch.manual_seed(0)
    vision = {
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
    }
    text = {k: v for k, v in vision.items() if k not in ("image_size", "patch_size")} | {
        "vocab_size": 99,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    square = {"height": 32, "width": 32}
    flexible = {k: v for k, v in vision.items() if k != "image_size"} | {"num_patches": 16}
    clip = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    siglip = transformers.SiglipConfig(text_config=text, vision_config=vision)
    dinov2 = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 56, "patch_size": 14}
    registers = transformers.Dinov2WithRegistersConfig(**dinov2, num_register_tokens=4)
    dinov3 = transformers.DINOv3ViTConfig(**vision | {"num_register_tokens": 4})
    cropped = transformers.BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28})
    stages = ["stage1", "stage2", "stage3", "stage4"]
    swin = transformers.SwinConfig(
        image_size=64, embed_dim=16, depths=[1] * 4, num_heads=[2] * 4, window_size=4, out_features=stages
    )
    mask2former = transformers.Mask2FormerConfig(
        backbone_config=swin,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=10,
        num_labels=133,
    )
    resnet = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12, 16, 24], depths=[1] * 4, layer_type="basic", out_features=stages
    )
    detr = {
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
        "encoder_attention_heads": 8,
        "decoder_attention_heads": 8,
        "num_queries": 10,
    }
    maskformer = transformers.MaskFormerConfig(
        backbone_config=swin,
        decoder_config=transformers.DetrConfig(**detr),
        fpn_feature_size=32,
        mask_feature_size=32,
        num_labels=133,
    )
    sizes = {"shortest_edge": 64, "longest_edge": 96}
    made = {
        "clip": (
            transformers.CLIPModel(clip),
            transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=square),
        ),
        "siglip": (transformers.SiglipModel(siglip), transformers.SiglipImageProcessorPil(size=square)),
        "dinov2": (transformers.Dinov2Model(transformers.Dinov2Config(**dinov2)), cropped),
        "dinov2_with_registers": (transformers.Dinov2WithRegistersModel(registers), cropped),
        "dinov3": (transformers.DINOv3ViTModel(dinov3), cropped),
        "siglip2": (
            transformers.Siglip2Model(transformers.Siglip2Config(text_config=text, vision_config=flexible)),
            transformers.Siglip2ImageProcessorPil(patch_size=8),
        ),
        "mask2former": (
            transformers.Mask2FormerForUniversalSegmentation(mask2former),
            transformers.Mask2FormerImageProcessorPil(size=sizes, size_divisor=32, ignore_index=255),
        ),
        "maskformer": (
            transformers.MaskFormerForInstanceSegmentation(maskformer),
            transformers.MaskFormerImageProcessorPil(size=sizes, size_divisor=32),
        ),
        "detr": (
            transformers.DetrForSegmentation(
                transformers.DetrConfig(backbone_config=resnet, num_labels=LABELS, **detr)
            ),
            transformers.DetrImageProcessorPil(size=sizes),
        ),
    }
    # Random class heads are sure of nothing: larger weights make segments that pass the usual thresholds.
    with torch.no_grad():
        made["mask2former"][0].class_predictor.weight *= 300
        made["detr"][0].detr.class_labels_classifier.weight *= 100
    for kind, (model, processor) in made.items():
        model.save_pretrained(folder / kind)
        processor.save_pretrained(folder / kind)
    described = folder / "dinov3" / "preprocessor_config.json"
    fields = json.loads(described.read_text())
    fields |= {"image_processor_type": "DINOv3ViTImageProcessorFast", "size": square}  # as published ones say
    described.write_text(json.dumps({name: fields[name] for name in fields if "crop" not in name}))
    return {kind: str(folder / kind) for kind in made}


def write_captions(path: Path, names: list[str]) -> None:
    """Two captions each, the last photograph in the split val."""
    rows = ["image,caption,split"]
    for place, name in enumerate(names):
        split = "val" if place == len(names) - 1 else "train"
        rows += [f'{name},"a photograph, number {place}, seen {n}",{split}' for n in range(2)]
    path.write_text("\n".join(rows) + "\n")
