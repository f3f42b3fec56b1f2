"""The published names and layouts, written down as torch has them, against the trees of our modules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from shnet_jax.interop.torch_weights import (
    gpo_params,
    gpo_slots,
    image_encoder_slots,
    text_head_slots,
    to_variables,
)
from shnet_jax.models.pooling import GPO
from tests.parity.shnet import encoder

X, D, C = 10, 8, 133
SM, SP = "crossmodalfusion_sm", "crossmodalfusion_sp"


def linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name: str, size: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def batch_norm(name: str, size: int) -> dict[str, tuple[int, ...]]:
    return norm(name, size) | {f"{name}.running_mean": (size,), f"{name}.running_var": (size,)}


def mlp(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return (
        linear(f"{name}.layers.0", inputs, D // 2)
        | batch_norm(f"{name}.bns.0", D // 2)
        | linear(f"{name}.layers.1", D // 2, outputs)
    )


def gpo(prefix: str) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}linear.weight": (1, 32)}
    for end in ("l0", "l0_reverse"):
        shapes |= {f"{prefix}gru.weight_{kind}_{end}": (96, 32) for kind in ("ih", "hh")}
        shapes |= {f"{prefix}gru.bias_{kind}_{end}": (96,) for kind in ("ih", "hh")}
    return shapes


IMAGE = (
    linear("fc", X, D)
    | mlp("mlp", X, D)
    | linear(f"{SM}.embed_seg_HW.2", C, D)
    | norm(f"{SM}.embed_seg_HW.5", D)
    | mlp(f"{SM}.MLP_seg", D, D)
    | mlp(f"{SM}.MLP_image", D, D)
    | linear(f"{SM}.fc_scale", D, D)
    | linear(f"{SM}.fc_1", D, D)
    | {f"{SP}.embedding_Seg.0.weight": (128, 9, 3, 3), f"{SP}.embedding_Seg.0.bias": (128,)}
    | batch_norm(f"{SP}.embedding_Seg.1", 128)
    | mlp(f"{SP}.MLP_image", D, 128)
    | mlp(f"{SP}.embed_fusion", 128, D)
    | mlp("fusion_mlp", D, D)
    | linear("embed_seg_C.1", C, D)
    | norm("embed_seg_C.4", D)
    | mlp("seg_mlp", D, D)
    | linear("embed_category.0", C, D)
    | norm("embed_category.3", D)
    | gpo("gpool.")
)
DEAD = {
    "mlp.bns.1.weight": (D,),
    "mlp.bns.1.running_var": (D,),
    "mlp.bns.0.num_batches_tracked": (),
}


def arrays(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def test_image_encoder_fills_every_array_of_the_model():
    batch = {
        "regions": jnp.zeros((1, 2, X)),
        "region_mask": jnp.ones((1, 2), bool),
        "seg_map": jnp.zeros((1, 4, 4), jnp.uint8),
        "categories": jnp.zeros((1, C), bool),
        "seg_semantic": jnp.zeros((1, C, 2, 2)),
    }
    model = jax.eval_shape(lambda: encoder(D).init(jax.random.key(0), batch, train=False))
    ours = to_variables(arrays(IMAGE | DEAD), image_encoder_slots())
    assert jax.tree.map(np.shape, ours) == jax.tree.map(lambda leaf: leaf.shape, model)


def test_gpo_fills_every_array_of_the_model():
    model = jax.eval_shape(lambda: GPO().init(jax.random.key(0), jnp.zeros((1, 3, D)), jnp.ones((1, 3), bool)))
    given = arrays(gpo("gpool."))
    ours = gpo_params(given | {"fc.weight": np.zeros(3)}, "gpool.")  # takes its own from a whole encoder
    assert jax.tree.map(np.shape, ours) == jax.tree.map(lambda leaf: leaf.shape, model["params"])
    np.testing.assert_array_equal(ours["backward"]["hidden_kernel"], given["gpool.gru.weight_hh_l0_reverse"].T)
    np.testing.assert_array_equal(ours["forward"]["input_bias"], given["gpool.gru.bias_ih_l0"])


@pytest.mark.parametrize("slots", [image_encoder_slots(), text_head_slots(), gpo_slots("")])
def test_no_two_names_share_a_place(slots):
    places = [(slot.collection, *slot.path) for slot in slots.values()]
    assert len(set(places)) == len(places)
    for place in places:  # nor does one lie inside another
        assert not any(other != place and other[: len(place)] == place for other in places)


def test_places_lie_below_the_given_path():
    for slot in (image_encoder_slots("model", "image") | text_head_slots("model", "text")).values():
        assert slot.path[:2] in (("model", "image"), ("model", "text"))


def test_layouts_are_turned():
    """Square matrices too, which no shape would tell."""
    given = arrays(IMAGE)
    slots = image_encoder_slots()
    flat = traverse_util.flatten_dict(to_variables(given, slots))
    for name, torch in given.items():
        ours = flat[(slots[name].collection, *slots[name].path)]
        if torch.ndim == 4:
            for o, i, row, column in np.ndindex(3, 9, 3, 3):
                assert ours[row, column, i, o] == torch[o, i, row, column]
        elif name == "gpool.linear.weight":
            np.testing.assert_array_equal(ours, torch[0])
        else:
            np.testing.assert_array_equal(ours, torch.T)


def test_text_head():
    given = arrays(linear("linear", 12, D) | gpo("gpool."))
    assert set(text_head_slots()) == set(given)
    params = to_variables(given, text_head_slots())["params"]
    np.testing.assert_array_equal(params["head"]["kernel"], given["linear.weight"].T)


def test_unknown_and_missing_arrays_are_named():
    given = arrays(IMAGE | DEAD)
    given["fc2.weight"] = given.pop("fc.weight")
    with pytest.raises(ValueError, match=r"unknown \['fc2\.weight'\], missing \['fc\.weight'\]"):
        to_variables(given, image_encoder_slots())


def test_parameters_may_come_without_statistics_but_not_with_some():
    slots = image_encoder_slots()
    params = {name: a for name, a in arrays(IMAGE).items() if "running" not in name}
    assert set(to_variables(params, slots)) == {"params"}
    with pytest.raises(ValueError, match=r"missing \['mlp\.bns\.0\.running_var'"):
        to_variables(params | {"mlp.bns.0.running_mean": np.zeros(4)}, slots)


def test_nothing_known_is_not_a_set_of_weights():
    with pytest.raises(ValueError, match=r"missing \['linear\.weight'"):
        gpo_params(arrays(gpo("gpool.")), prefix="")


def test_a_score_of_more_than_one_output_is_refused():
    given = arrays(gpo("")) | {"linear.weight": np.zeros((2, 32))}
    with pytest.raises(ValueError, match="size not equal to one"):
        gpo_params(given)
