"""Makes the recording in this folder: a tiny CLIP of random numbers as Hugging Face saves it, and what it computes.

    python tests/golden/clip/make.py     # needs torch and transformers 4.57, which nothing else in the project does

Weights are rounded to float16 before anything is computed, so that the small file holds them exactly.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTokenizerFast

HERE = Path(__file__).parent
MERGES = ["t h", "th e</w>", "m a", "ma n</w>", "r e", "re d</w>", "a n", "w o", "wo man</w>", "i n", "in g</w>"]
CAPTIONS = [
    "The man in a RED jacket.",
    "a  woman's bag,\nwearing  blue-white trainers no. 42!",
    "Café ☂ naïve  <|x|>",
    "!",
    "don't they're we've I'm he'll she'd",
]


def characters() -> list[str]:
    ranges = (("!", "~"), ("¡", "¬"), ("®", "ÿ"))
    printable = [i for a, b in ranges for i in range(ord(a), ord(b) + 1)]
    return [*map(chr, printable), *(chr(256 + i) for i in range(256 - len(printable)))]


def write_vocabulary() -> int:
    alphabet = characters()
    pieces = [*alphabet, *(c + "</w>" for c in alphabet), *(m.replace(" ", "") for m in MERGES)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    assert len(set(pieces)) == len(pieces)
    (HERE / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]) + "\n", encoding="utf-8")
    (HERE / "vocab.json").write_text(json.dumps({p: i for i, p in enumerate(pieces)}), encoding="utf-8")
    return len(pieces)


def main() -> None:
    torch.manual_seed(0)
    size = write_vocabulary()
    tokenizer = CLIPTokenizerFast(str(HERE / "vocab.json"), str(HERE / "merges.txt"))
    tokenizer.backend_tokenizer.save(str(HERE / "tokenizer.json"))
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    common = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = common | {"vocab_size": size, "max_position_embeddings": 40, "eos_token_id": end, "bos_token_id": end - 1}
    vision = common | {"hidden_size": 24, "image_size": 32, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Larger than CLIP's first weights, norms and biases included: every term has to matter.
            parameter.copy_((parameter + 0.15 * torch.randn_like(parameter)).half().float())
    model.save_pretrained(HERE)
    weights = load_file(HERE / "model.safetensors")
    save_file(
        {name: w.half() if w.is_floating_point() else w for name, w in weights.items()}, HERE / "model.safetensors"
    )

    ids = [tokenizer(c)["input_ids"] for c in CAPTIONS]
    width = max(map(len, ids))
    tokens = np.array([i + [end] * (width - len(i)) for i in ids])
    mask = np.arange(width) < np.array([[len(i)] for i in ids])
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    tall = generator.integers(0, 256, (2, 48, 16, 3), dtype=np.uint8)
    mean, deviation = (np.array(v) for v in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))

    def images(pictures: np.ndarray) -> torch.Tensor:
        return torch.tensor(((pictures / 255 - mean) / deviation).transpose(0, 3, 1, 2), dtype=torch.float32)

    def states(hidden: torch.Tensor) -> np.ndarray:
        return model.visual_projection(model.vision_model.post_layernorm(hidden)).numpy()

    with torch.no_grad():
        arguments = {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(mask)}
        words = model.text_projection(model.text_model(**arguments).last_hidden_state)
        recorded = {
            "tokens": tokens,
            "token_mask": mask,
            "words": words.numpy(),
            "caption_vectors": model.get_text_features(**arguments).numpy(),
            "pixels": pixels,
            "image_states": states(model.vision_model(images(pixels)).last_hidden_state),
            "image_vectors": model.get_image_features(images(pixels)).numpy(),
            "tall": tall,
        }
        # The learned 4 x 4 positions at 6 x 2, as IRRA interpolates them (bilinear, corners aligned).
        position = model.vision_model.embeddings.position_embedding.weight
        patches = position[1:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
        patches = torch.nn.functional.interpolate(patches, (6, 2), mode="bilinear", align_corners=True)
        embedding = model.vision_model.embeddings
        x = embedding.patch_embedding(images(tall)).flatten(2).transpose(1, 2)
        x = torch.cat([embedding.class_embedding.expand(2, 1, -1), x], 1)
        x = x + torch.cat([position[:1], patches.flatten(2)[0].T])
        x = model.vision_model.encoder(model.vision_model.pre_layrnorm(x)).last_hidden_state
        recorded["tall_states"] = states(x)
    np.savez(HERE / "outputs.npz", **recorded)
    (HERE / "captions.json").write_text(json.dumps({"captions": CAPTIONS, "ids": ids}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
