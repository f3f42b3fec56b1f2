"""ESA-style on CUHK-PEDES: CLIP ViT-B/16 fine-tuned from 384 x 128 pictures, hyper-parameters of IRRA (CVPR 2023)."""

from ml_collections import ConfigDict

from configs import esa_people


def get_config() -> ConfigDict:
    """Needs `--config.data.dir` (data_prep.from_person_search) and `--config.text.weights`, a CLIP ViT-B/16 folder.

    AdamW in place of Adam with decay in the gradient, and one learning rate for weights and biases: ours.
    """
    c = esa_people.get_config()
    c.name = "ESA-style, CUHK-PEDES"
    c.data.dir = ""
    c.data.resident = False
    c.data.captions_per_image = 1
    c.data.max_tokens = 77
    c.data.token_buckets = (32, 48, 77)
    c.data.word_change = 0.0
    c.tokenizer.kind = "clip"
    c.text.tower = "clip"
    c.text.width = 512
    c.text.heads = 8
    c.text.mlp_dim = 2048
    c.text.max_positions = 77
    c.model.dim = 512
    c.model.esa.source = "picture"
    c.model.esa.head = "none"
    c.model.esa.depth = 4
    c.loss.weights.infonce = 0.0
    c.loss.weights.sdm = 1.0
    c.optim.lr = 5e-5  # of what is new; CLIP's own parameters a fifth, 1e-5 (IRRA)
    c.optim.text_lr_factor = 0.2
    c.optim.weight_decay = 4e-5
    c.optim.decay_all = False
    c.optim.clip_norm = 0.0
    c.optim.schedule = "cosine"
    c.optim.warmup_epochs = 5.0
    c.train.batch_size = 64
    c.train.epochs = 60.0
    return c
