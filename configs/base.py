"""Every field of a configuration: its unit, meaning and default. The other files here change only what differs.

`shnet` takes any field as a flag: `--config=demo --config.train.batch_size=256`. An unknown field or a
value of the wrong type is an error. Faithful choices ("published") are those of the released 3SHNet code.

A duration stands in one of `*_steps` (batches), `*_epochs` and `*_percent` (of the training); the others are 0 or ().
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The published 3SHNet region model with BERT, but for `mask_same_image`; needs `data.dir` and `text.weights`."""
    c = ConfigDict()
    c.name = "shnet"  # name of the run, shown in tables
    c.seed = 0  # the one source of randomness: initial weights, order, dropout, augmentation
    c.data = _data()
    c.tokenizer = _tokenizer()
    c.model = _model()
    c.text = _text()
    c.loss = _loss()
    c.momentum = _momentum()
    c.optim = _optim()
    c.train = _train()
    c.parallel = _parallel()
    c.eval = _eval()
    c.search = _search()
    c.mine = _mine()
    c.page = _page()
    c.study = _study()
    c.cross = _cross()
    c.convert = _convert()
    c.plan = _plan()
    c.scale = _scale()
    return c


def _data() -> ConfigDict:
    """Data set, and how batches are drawn from it and altered."""
    data = ConfigDict()
    data.dir = ""  # data set made by data_prep: its folder, one that holds only it, or a URL as s3://BUCKET/SET
    data.train_split = "train"  # split trained on
    data.val_split = "val"  # split evaluated while training; selects the best checkpoint
    data.resident = False  # keep all training features on the device and send indices only (for sets that fit)
    data.captions_per_image = 1  # captions of one image that enter a step together; the image is encoded once for all
    data.max_tokens = 32  # longest caption in tokens, [CLS]/[SEP] included; the rest is cut
    data.token_buckets = (16, 24, 32)  # a batch is padded to the first of these that fits its longest caption
    data.region_drop = 0.2  # probability that a region is dropped in training (published 0.2)
    data.grid_drop_image = 0.8  # share of images that lose grid cells in training (VSE-infinity 0.8)
    data.grid_drop = 0.2  # each cell there with p = this * u, one u ~ U(1 - grid_drop_image, 1) (VSE-infinity 0.2)
    data.word_change = 0.2  # probability that a word is altered in training (published 0.2)
    data.word_mask = 0.5  # share of the altered words whose pieces become the mask token (published 0.5)
    data.word_random = 0.1  # share whose pieces become random tokens (published 0.1)
    data.word_delete = 0.4  # share that is deleted (published 0.4; the rest stays as it is)
    data.identity = True  # ids of the losses are persons where the data set knows them: no negatives of each other
    data.image_flip = 0.5  # pictures: probability of a mirror image in training (IRRA 0.5)
    data.image_pad = 10  # pictures: crop of this many black pixels around, in training (IRRA 10)
    data.image_erase = 0.5  # pictures: probability that a rectangle is erased in training (IRRA 0.5)
    data.image_erase_area = (0.02, 0.4)  # share of the picture that it takes (IRRA 0.02 to 0.4)
    data.shuffle_block = 0  # text.tower vectors: examples of a block, read in a row; 0: any order of all of them
    data.negatives = negatives = ConfigDict()  # hard negatives that `shnet mine` found with another run
    negatives.folder = ""  # folder of their lists; "": none
    negatives.count = 0  # hard negatives that each example brings into its batch, within train.batch_size
    data.read_threads = 4  # threads that read and decode records ahead
    data.prefetch = 8  # batches read ahead
    return data


def _tokenizer() -> ConfigDict:
    """Vocabulary of the captions."""
    tokenizer = ConfigDict()
    tokenizer.kind = "wordpiece"  # wordpiece (BERT's) | sentencepiece (made by data_prep) | clip | siglip (their own)
    tokenizer.path = ""  # the vocabulary, or the folder of it; "": of text.weights, or of data.dir
    return tokenizer


def _model() -> ConfigDict:
    """Both encoders; sections named after a model are read by that model alone, clip by esa."""
    model = ConfigDict()
    model.name = "shnet"  # file in shnet_jax/models, or the dotted path of a module of yours
    model.dim = 1024  # size of the joint embedding (published 1024)
    model.units = ("regions",)  # visual units: "regions", "grid", or both (one joint model over both sets)
    model.semantic = True  # semantic highlighting (VSeM)
    model.spatial = True  # spatial highlighting (VSpM)
    model.scene_tokens = True  # the cells of seg_semantic join the pooled set
    model.category_token = True  # the category vector joins the pooled set
    model.global_residual = False  # a linear map of image_embedding is added to the pooled vector (published: none)
    model.num_classes = 133  # classes of the label map and of the category vector (COCO panoptic 133)
    model.map_channels = 128  # channels of the convolved label map (published 128)
    model.map_input = "raw_id"  # label map as "raw_id" (published) | "embedding" (learned, 16 channels)
    model.map_position = "1d"  # position code of the map: "1d" flattened index (published) | "2d" row and column
    model.spatial_scale = 4.0  # factor on the logits of the spatial attention (published 4)
    model.bn_include_padding = True  # padded rows enter the BatchNorm statistics (published True)
    model.bn_sync = False  # BatchNorm statistics over all devices (published: each device its own)
    model.dropout = 0.1  # dropout of the segmentation embeddings (published 0.1)
    model.feature_dropout = 0.0  # dropout on the features of every unit, for small training sets (published 0)
    model.dtype = "float32"  # operands of products: float32 | bfloat16 | auto (bfloat16 where the device is fast at it)
    model.activation_dtype = "float32"  # of what lies between the layers of both towers: float32 | bfloat16
    model.user = _user()
    model.esa = _esa()
    model.clip = _clip()
    model.cmsei = _cmsei()
    model.align = _align()
    model.dual = _dual()
    return model


def _user() -> ConfigDict:
    """Options of model.name "user", see docs/models.md."""
    user = ConfigDict()
    user.guides = ("sge",)  # what enhances the units: "sge" (published), "cge" (image_embedding: ours); (): nothing
    user.attention_scale = 1.0  # factor on the scores of guide and units (published 1)
    user.dropout = 0.4  # dropout within the self-guide (published 0.4)
    user.norm = "slots"  # of the self-guide: "slots", BatchNorm per place of 36 (published) | "layer", any number
    return user


def _esa() -> ConfigDict:
    """Options of model.name "esa", see docs/models.md."""
    esa = ConfigDict()
    esa.source = "units"  # what the image tower reads: "units" of the record | "picture", by CLIP's vision tower
    esa.head = "learned"  # "learned": linear, MLP and GPO over units and words | "none": tokens as a CLIP gives them
    esa.size = 4  # elements of an image's set (DivE 4); 0: global vectors alone, the plain model
    esa.text_size = 4  # elements of a caption's set; may differ; 0 with size 0
    esa.mode = "slot"  # how tokens become elements: slots that compete for them | "merge", soft clusters
    esa.depth = 2  # rounds of slot attention, which share their weights (DivE 4)
    esa.heads = 4  # attention heads of the slots (DivE 4)
    esa.similarity = "smooth_chamfer"  # of sets: smooth_chamfer | chamfer | maxsim_texts | maxsim_images | max | mean
    esa.sharpness = 16.0  # of smooth_chamfer (DivE 16)
    esa.eta = 1.0  # weight of the set term beside the cosine of the global vectors (ours 1)
    return esa


def _clip() -> ConfigDict:
    """Vision tower of model.esa.source "picture"; the folder text.weights sets its sizes."""
    clip = ConfigDict()
    clip.grid = (14, 14)  # patches that the positions were learned for; other pictures interpolate them
    clip.patch = 16  # pixels of a side of a patch
    clip.layers = 12  # transformer layers
    clip.width = 768  # hidden size
    clip.heads = 12  # attention heads
    clip.mlp_dim = 3072  # hidden size of the MLP
    clip.projection = 512  # size of the joint space
    clip.activation = "quick_gelu"  # quick_gelu | gelu
    clip.remat = False  # layers are computed again in the backward pass instead of kept
    return clip


def _cmsei() -> ConfigDict:
    """Options of model.name "cmsei", see docs/models.md."""
    cmsei = ConfigDict()
    cmsei.spatial_graph = True  # regions reason over who overlaps whom; needs boxes
    cmsei.semantic_graph = True  # regions reason over the scene graph's relations (without any: the identity)
    cmsei.iou_threshold = 0.4  # IoU above which two regions are neighbours; below 0: all pairs are
    cmsei.relation_threshold = 0.5  # confidence above which a predicted relation counts (relation_scores)
    cmsei.geometry_heads = 0  # H > 0: H parts of the spatial messages, weighed by learned functions of the geometry
    cmsei.attend = ("objects", "words")  # who attends to the other side; (): global vectors alone
    cmsei.refine = True  # gated refinement of regions and words by what they attend to
    cmsei.sharpness = (9.0, 9.0)  # factor on the attention of objects and of words (SCAN 9 and 4 to 9)
    cmsei.cross_sharpness = 4.0  # factor on the attention of a side's elements to the other side's global vector
    cmsei.local_weight = 1.0  # weight of the alignment in the score
    cmsei.cross_weight = 0.5  # weight of object-sentence and of word-image in the score; 0: no cross-level attention
    cmsei.global_weight = 1.0  # weight of the product of the global vectors in the score
    cmsei.block = 0  # pairs computed at once, memory grows with block * (regions + tokens) * dim; 0: CPU 64, else 512
    return cmsei


def _align() -> ConfigDict:
    """Options of model.name "align": the image side of heads on frozen features (docs/frozen-features.md)."""
    align = ConfigDict()
    align.source = "vector"  # what the image side reads: "vector", image_embedding (SAIL) | "units" of the record
    align.pool = "mean"  # units to one vector: mean | gpo | attention
    align.pool_first = True  # pool each kind of units, then map | False: map each unit, then pool all
    align.vectors = ()  # vectors beside pooled units: image_embedding | coverage (mean of seg_semantic) | categories
    align.vectors_gain = 1.0  # first gain of the LayerNorm of each of these vectors, that of units is 1
    align.head = _head()
    return align


def _head() -> ConfigDict:
    """A head on stored vectors: LayerNorm and a mapping to model.dim (shnet_jax/models/heads.py)."""
    head = ConfigDict()
    head.kind = "star"  # star (SAIL) | mlp | linear | swiglu | sharelock | none: the vector as it is
    head.hidden = 0  # size of the hidden layer; 0: as published, star 8 and mlp 4 times the vector, sharelock 4096
    head.dropout = 0.0  # on hidden activations; linear, swiglu: on the vector (SAIL 0, ShareLock 0.2)
    return head


def _dual() -> ConfigDict:
    """Options of model.name "dual", see docs/models.md."""
    dual = ConfigDict()
    dual.head = "none"  # behind each vector of the dual encoder: "none", zero-shot | "residual", x + linear(x) (ours)
    return dual


def _text() -> ConfigDict:
    """Text tower, the same choice for every model."""
    text = ConfigDict()
    text.tower = "bert"  # bert | bigru | transformer | clip | siglip | vectors: a head on vectors of the record
    text.source = "caption_embeddings"  # vectors: caption_embeddings, one a caption | caption_tokens, one a token
    text.head = _head()  # vectors: the head
    text.weights = ""  # bert, clip, siglip: folder as Hugging Face saves it; "minilm": what `make minilm` installs
    text.vocab_size = 0  # tokens of the vocabulary; 0: taken from the tokenizer
    text.layers = 12  # transformer layers (bert, transformer); set by the weights folder when there is one
    text.width = 768  # hidden size; for bigru the size of one direction is half of it
    text.heads = 12  # attention heads (bert, transformer)
    text.mlp_dim = 3072  # hidden size of the transformer's MLP (bert, transformer)
    text.max_positions = 512  # learned positions (bert, transformer)
    text.dropout = 0.1  # dropout on hidden states and attention weights
    text.frozen_layers = 0  # bert, clip, siglip: layers that stay as loaded, without dropout, from the first on
    text.remat = False  # layers are computed again in the backward pass instead of kept (all but bigru)
    text.projection = 512  # clip, siglip: size of its joint space; set by the weights folder
    text.activation = "quick_gelu"  # clip, siglip: quick_gelu | gelu | gelu_pytorch_tanh; set by the weights folder
    text.dtype = "float32"  # operands of products in the text tower, as model.dtype
    return text


def _loss() -> ConfigDict:
    """Weight of each loss, how pairs meet across devices, and the options of each loss."""
    loss = ConfigDict()
    loss.weights = weights = ConfigDict()  # weight of each loss term, a file in shnet_jax/losses; 0: not computed
    weights.triplet = 1.0  # triplet loss with hard negatives (published 1)
    weights.global_triplet = 0.0  # the triplet loss on global vectors, beside a score that looks inside (CMSEI-style 1)
    weights.infonce = 0.0  # symmetric softmax cross-entropy of CLIP (published 0)
    weights.sigmoid = 0.0  # SigLIP's sigmoid loss (published 0)
    weights.uto = 0.0  # USER's unified objective, meant for config.momentum (published 0)
    weights.sdm = 0.0  # similarity distribution matching of global vectors (IRRA 1)
    weights.identity = 0.0  # cross-entropy of persons, for data sets that know them (IRRA 1)
    weights.asm = 0.0  # adaptive semantic margin, ESA-style (ours 1)
    weights.diversity = 0.0  # elements of a set repel each other, both modalities lie alike (DivE 0.01)
    loss.pairs = pairs = ConfigDict()  # how the pairs of a global batch meet; see shnet_jax/losses/pairs.py
    pairs.strategy = "gathered"  # gathered | streamed | ring | local (local: each device's pairs only)
    pairs.tile = 0  # candidates scored at once by "streamed"; 0: CPU 1024, else by memory, 128 to 8192
    pairs.dtype = "float32"  # operands of training scores, sums are float32: float32 | bfloat16 (dot products alone)
    loss.matryoshka = ()  # sizes of prefixes over which the loss is averaged, as (64, 128, 256, 512); (): whole vectors
    loss.triplet = triplet = ConfigDict()
    triplet.margin = 0.2  # gap wanted between a match and a negative, in cosine
    triplet.warmup_epochs = 1.0  # sum over all violations this long, then the hardest negative only (published 1)
    triplet.warmup_steps = 0  # the same in steps
    triplet.warmup_percent = 0.0  # the same in per cent of the training
    triplet.reduction = "sum"  # over the batch: "sum" (published) | "mean"
    triplet.rank = 1  # k: the k-th hardest negative instead of the hardest (published 1)
    triplet.softness = 0.0  # t > 0: t * logsumexp(scores / t) of the negatives instead of the hardest (published 0)
    triplet.mask_same_image = True  # captions of the same image are no negatives (published False)
    loss.global_triplet = ConfigDict(triplet)  # its own margin and so on, in cosine
    loss.infonce = infonce = ConfigDict()
    infonce.temperature = 0.07  # initial temperature of the softmax
    infonce.learn_temperature = True  # the temperature is a parameter (as in CLIP)
    infonce.mask_same_image = True  # captions of the same image are no negatives
    loss.sigmoid = sigmoid = ConfigDict()
    sigmoid.scale = 10.0  # initial factor on the scores, learned (SigLIP 10)
    sigmoid.bias = -10.0  # initial bias, learned (SigLIP -10)
    sigmoid.mask_same_image = True  # captions of the same image elsewhere in the batch are no negatives (SAIL False)
    sigmoid.reduction = "queries"  # sum over all entries, by the pairs B: "queries" (SigLIP) | by all: "pairs" (SAIL)
    sigmoid.scale_limits = ()  # the scale is clamped to these two after every step; (): not (SAIL 1 and 100)
    loss.uto = uto = ConfigDict()
    uto.scale = 90.0  # mu, sharpness of the sum over negatives (USER 90)
    uto.offset = 0.5  # gamma, score from which on a negative counts (USER 0.5)
    uto.batch_weight = 1.0  # lambda, weight of the in-batch part beside that of the queues (USER 1 COCO, 20 Flickr30K)
    uto.mask_same_image = True  # captions of the same image are no negatives, in batch and queues (USER False)
    loss.sdm = sdm = ConfigDict()
    sdm.temperature = 0.02  # of the softmax over the cosines of a query (IRRA 0.02)
    loss.identity = identity = ConfigDict()
    identity.classes = 0  # persons of the training split; 0: taken from the data set
    identity.dim = 0  # size of the embedding; 0: model.dim
    loss.asm = asm = ConfigDict()
    asm.margin = 0.2  # of unrelated items, in units of the score; sign 1 makes it up to twice that (ours 0.2)
    asm.sign = -1  # -1: a smaller margin between items that are close in meaning | 1: a larger one (ours -1)
    asm.scale = 1.0  # of the semantic term; 0: the margin is fixed (ours 1)
    asm.of = "set"  # "set": the set term of the score | "score": the whole score (ours "set")
    loss.diversity = diversity = ConfigDict()
    diversity.sharpness = 2.0  # of the repulsion between elements of a set (DivE 2)
    diversity.gamma = 0.0  # of the kernel that compares the modalities; 0: 1 / dimension (DivE)
    return loss


def _momentum() -> ConfigDict:
    """Momentum encoders, and queues of their embeddings as negatives."""
    momentum = ConfigDict()
    momentum.queue = 0  # images, and captions, of past batches that are kept as negatives; 0: no momentum encoders
    momentum.from_epoch = 0.0  # the queues take part in the losses from here on (USER 0)
    momentum.from_step = 0  # the same in steps
    momentum.from_percent = 0.0  # the same in per cent of the training
    momentum.decay = 0.999  # of the running average of the parameters that the key encoders are (USER 0.999)
    momentum.warm = False  # min(decay, (1 + step) / (10 + step)), for short runs (USER False)
    momentum.start = "uniform"  # first queues: "uniform" in 0..1, all alike (USER) | "gaussian", all directions
    momentum.image_train = True  # key image encoder as in training (USER True) | False: with averaged statistics
    momentum.text_train = False  # key text encoder as in training (USER False)
    return momentum


def _optim() -> ConfigDict:
    """The optimiser and the schedule of its learning rate."""
    optim = ConfigDict()
    optim.name = "adamw"  # adamw (published) | lion (SAIL)
    optim.lr = 5e-4  # peak learning rate (published 5e-4)
    optim.text_lr_factor = 0.1  # learning rate of the text tower (not its head) relative to lr (published 0.1)
    optim.schedule = "step"  # "step": times decay_factor at each decay | "cosine": to 0 at the end | "constant"
    optim.decay_epochs = (15.0,)  # epochs after which the step schedule decays (published 15)
    optim.decay_steps = ()  # the same in steps
    optim.decay_percent = ()  # the same in per cent of the training
    optim.decay_factor = 0.1  # factor of each decay (published 0.1)
    optim.warmup_epochs = 0.0  # linear warm-up of the learning rate (published none)
    optim.warmup_steps = 0  # the same in steps
    optim.warmup_percent = 0.0  # the same in per cent of the training
    optim.weight_decay = 1e-4  # decoupled decay per step, times the learning rate (published 1e-4)
    optim.decay_all = True  # decay norms and biases too (published True)
    optim.b1 = 0.9  # AdamW, first moment; Lion, the gradient in the update (SAIL 0.9)
    optim.b2 = 0.999  # AdamW, second moment; Lion, the average that is kept (SAIL 0.99)
    optim.clip_norm = 2.0  # largest global gradient norm; 0: no clipping (published 2)
    optim.ema = 0.0  # decay per batch of the running average that is evaluated; 0: none
    optim.accumulate = 1  # batches whose gradients are averaged before an update
    return optim


def _train() -> ConfigDict:
    """Length and batches of a training, and what happens how often."""
    train = ConfigDict()
    train.batch_size = 256  # image-caption pairs of a batch over all devices (published 256 on COCO)
    train.microbatch = 0  # pairs that a device encodes at once (cached gradients: same gradient, less memory); 0: all
    train.microbatch_statistics = "exact"  # BatchNorm over microbatches: exact (whole batch) | local | running
    train.epochs = 25.0  # passes over all captions of the training split (published 25)
    train.steps = 0  # batches, in place of train.epochs; 0: as many as train.epochs need
    train.init_from = ""  # warm start: work folder, exported folder or .safetensors of the first parameters; "": none
    train.init_partial = False  # take those arrays of it that fit, instead of refusing a model of other arrays
    train.log_steps = 50  # steps between two log lines; their numbers are means over these steps
    train.log_epochs = 0.0  # the same in epochs
    train.log_percent = 0.0  # the same in per cent of the training
    train.log_to = ()  # trackers beside metrics.jsonl and TensorBoard: wandb, mlflow, trackio (each an extra)
    train.log_project = "shnet"  # project of W&B and trackio, experiment of MLflow
    train.log_tags = ()  # tags of the run in W&B; in MLflow and trackio one tag, or field, "tags"
    train.profile_steps = ()  # (first, last): steps that JAX's profiler traces into WORKDIR/profile; (): none
    train.eval_epochs = 1.0  # epochs between two evaluations on val_split; all three 0: only at the end
    train.eval_steps = 0  # the same in steps
    train.eval_percent = 0.0  # the same in per cent of the training
    train.checkpoint_steps = 500  # steps between two saved states (each evaluation and the end save too)
    train.checkpoint_epochs = 0.0  # the same in epochs
    train.checkpoint_percent = 0.0  # the same in per cent of the training
    train.keep = 2  # newest states kept, beside the best
    train.on_nonfinite = "stop"  # loss or gradient not finite: "stop" (state before it is saved) | "skip" the update
    return train


def _parallel() -> ConfigDict:
    """Devices that train, and how the step is split over them."""
    parallel = ConfigDict()
    parallel.mapping = "shard_map"  # how the per-device step is mapped: shard_map | pmap
    parallel.devices = 0  # devices used; 0: all
    parallel.shard_params = False  # split parameters and optimiser state over the devices (FSDP; shard_map only)
    parallel.model = 1  # devices of a group, which share a part of the batch and split what rules name (shard_map only)
    parallel.rules = ("tensor",)  # what groups split: "tensor" (transformer layers, align's heads) | "REGEX = AXES"
    return parallel


def _eval() -> ConfigDict:
    """How a model is ranked, and what --mode=eval reports."""
    evaluate = ConfigDict()
    evaluate.split = "test"  # split of --mode=eval
    evaluate.batch_size = 128  # images, or captions, encoded at once on each device
    evaluate.tile = 0  # images of a tile, 8 times as many captions (costly scores: as many); 0: CPU 512, else 2048
    evaluate.protocols = ("whole",)  # galleries: "whole" split, "folds5": mean over 5 consecutive parts (COCO 1K)
    evaluate.person = False  # also CMC R@1/5/10, mAP and mINP of captions by persons, and R@1 of these selects
    evaluate.checkpoint = "best"  # state evaluated by --mode=eval: best | last
    evaluate.score_dtype = "float32"  # scores: float32 | bfloat16 (float32 where the order is in doubt: the same ranks)
    evaluate.overlap = False  # images on one half of the devices, captions on the other, reading ahead: the same bits
    evaluate.two_stage = 0  # k > 0: --mode=eval also ranks in two stages, k candidates of each query re-ranked
    evaluate.exact = True  # with two_stage: rank exactly too (hours); False: not, nor in cross, study, search, page
    evaluate.stage_one = "vectors"  # what finds these candidates: global "vectors" | "fde", encodings of the sets (esa)
    evaluate.fde = fde = ConfigDict()  # fixed-dimensional encodings (MUVERA); 2^k_sim * r_reps * d_proj numbers a role
    fde.k_sim = 2  # hyperplanes that cut space into 2^k_sim cells; sets of many elements want more
    fde.r_reps = 10  # independent partitions; more: closer to the score
    fde.d_proj = 16  # dimension of an element in a cell, by a random projection; 0: not projected
    fde.d_final = 0  # dimension of a count sketch of each role's encoding; 0: none
    evaluate.stages = 1  # devices that share the text tower's layers (not bigru's); 1: each has them all
    evaluate.microbatches = 8  # parts in which the captions of a batch flow through these stages
    evaluate.dims = ()  # --mode=eval: also by prefixes of these sizes of the vectors (loss.matryoshka); (): not
    evaluate.hubness = False  # --mode=eval: also how unevenly items are retrieved (skewness of the 10-occurrence)
    evaluate.eccv = ""  # --mode=eval on COCO's test split: folder of ECCV Caption's judgements, or "package"; "": not
    evaluate.cxc = ""  # --mode=eval on COCO: folder with sis_*.csv, sts_*.csv of Crisscrossed Captions; "": not
    evaluate.compare = ""  # --mode=eval: queries_*.npz of another run, to which differences are given; "": none
    evaluate.ensemble = ()  # --mode=eval: work folders of runs whose scores are averaged; (): evaluate --workdir
    evaluate.ensemble_weights = ()  # weight of each of these runs; (): equal
    return evaluate


def _search() -> ConfigDict:
    """Split and index of --mode=embed, search and page."""
    search = ConfigDict()
    search.split = "test"  # split whose images and captions are embedded and searched
    search.embeddings = ""  # folder of its embeddings; "": WORKDIR/embeddings/DATASET_SPLIT_STEP
    search.dims = 0  # numbers of a vector that are kept, the first, at unit length; 0: all (loss.matryoshka)
    search.index = "exact"  # exact (any score) | int8, binary (codes in a file) | faiss (a file) | milvus (or a server)
    search.rescore = 4  # items that an index finds for each wanted result; the stored vectors choose among them
    search.binary = "asymmetric"  # of index binary: "asymmetric", float query times signs | "hamming", signs of both
    search.faiss = "HNSW32"  # FAISS factory string: "Flat", "HNSW32", "IVF1024,Flat", "OPQ32,IVF4096,PQ32", ...
    search.train_vectors = 262144  # vectors that a FAISS index which has to be trained learns from, at most
    search.milvus = "HNSW"  # Milvus index type: FLAT | IVF_FLAT | HNSW | AUTOINDEX ...
    search.address = ""  # Milvus: file or http address; "": milvus.db in the folder of the embeddings
    search.nprobe = 64  # inverted lists that a query visits, of an IVF index
    search.ef_search = 64  # candidates that a query keeps while it walks the graph, of an HNSW index
    return search


def _mine() -> ConfigDict:
    """Hard negatives of the training split that --mode=mine finds with a trained run, for data.negatives."""
    mine = ConfigDict()
    mine.folder = ""  # where they are written; "": WORKDIR/negatives/DATASET_SPLIT_STEP
    mine.per_item = 16  # negatives of each caption, and of each image, at most
    mine.max_relative_score = 0.95  # largest score of a negative, as a share of the score of the positive
    return mine


def _page() -> ConfigDict:
    """Contents of the HTML page, about config.search.split."""
    page = ConfigDict()
    page.pictures = ""  # folder of photographs, ID.jpg, .jpeg, .png, .webp; "": `pictures` beside the data set, if any
    page.queries = 6  # captions, and images, shown with what they find, evenly spaced in the split
    page.failures = 4  # worst-ranked captions, and images, shown
    page.highlights = 4  # images whose highlighting is shown
    page.results = 5  # results shown for a query
    return page


def _study() -> ConfigDict:
    """Arms that --mode=study trains and compares."""
    study = ConfigDict()
    study.seeds = (0,)  # --mode=study trains every arm with each of these seeds
    study.arms = ConfigDict()  # name of an arm -> the fields in which it differs from this configuration
    off = {"semantic": False, "spatial": False, "scene_tokens": False, "category_token": False}
    study.arms.full = ConfigDict({})  # the configuration as it is
    study.arms.semantic = ConfigDict({"model": {"spatial": False}})  # published ablation: keeps the extra tokens
    study.arms.spatial = ConfigDict({"model": {"semantic": False}})  # published ablation: keeps the extra tokens
    study.arms.none = ConfigDict({"model": off})  # no segmentation input at all: VSE-infinity
    study.only = ()  # names of the arms to run; (): all
    study.ensembles = ConfigDict()  # name of a row -> arms whose models of the same seed are averaged, as a tuple
    study.jobs = 1  # runs trained at the same time, each with its share of the cores; CPU only: elsewhere 1
    study.compare = ()  # "ARM - OTHER": intervals of the difference; pairs that study.only leaves out are not compared
    return study


def _cross() -> ConfigDict:
    """Runs that --mode=cross evaluates on every data set, without training."""
    cross = ConfigDict()
    cross.runs = ()  # work folders of the runs, the rows
    cross.data_dirs = ()  # folders of the data sets, the columns; on each, eval.split is evaluated
    return cross


def _convert() -> ConfigDict:
    """Source or target of --mode=convert; give one of the two (docs/interop.md)."""
    convert = ConfigDict()
    convert.source = ""  # .pth of the published code, or a folder that config.convert.to made: becomes the --workdir
    convert.to = ""  # folder to be made from the --workdir: model.safetensors, config.json, vocabulary
    return convert


def _plan() -> ConfigDict:
    """Sizes for --mode=plan of a data set that is not there (config.data.dir is "")."""
    plan = ConfigDict()
    plan.search = True  # also find the largest batch that fits (a compilation for each size tried)
    plan.effort = 0.0  # the compiler's effort: 0 as for training | down to -1: sooner, shows more memory and traffic
    plan.images = 113287  # images in the training split (COCO, Karpathy split: 113,287)
    plan.gallery = 113287  # images that an evaluation ranks, with their captions (COCO: test 5,000, training 113,287)
    plan.captions = 5  # captions of each image
    plan.regions = 36  # regions of an image
    plan.region_dim = 2048  # size of a region's feature
    plan.grid = 49  # grid cells of an image
    plan.grid_dim = 2048  # size of a grid cell's feature
    plan.image_embedding = 512  # size of the global vector of a pretrained model
    plan.caption_embedding = 768  # size of the stored vector of a caption, or of a token
    plan.persons = 11003  # persons in the training split, for a classifier of them (CUHK-PEDES: 11,003)
    plan.picture = (384, 128)  # height and width of a picture (person search)
    return plan


def _scale() -> ConfigDict:
    """Points of --mode=scale: the training step over devices, batches, strategies and precisions."""
    scale = ConfigDict()
    scale.devices = (1, 2, 4, 8)  # numbers of devices; on a CPU all above 1 are virtual: compiled and not run
    scale.pairs_per_device = (64,)  # weak scaling: pairs of each device, whatever the number of devices; (): none
    scale.batch_sizes = (512,)  # strong scaling: pairs of the batch over all devices; (): none
    scale.strategies = ("gathered", "streamed", "ring")  # values of loss.pairs.strategy
    scale.dtypes = ("float32", "bfloat16")  # values of model.dtype and text.dtype
    scale.warmup_steps = 3  # steps before those that are timed
    scale.steps = 20  # steps timed; their median counts
    scale.timeout = 1800.0  # seconds after which a point is given up
    return scale
