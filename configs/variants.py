"""Variants of a configuration file, as in `--config=configs/shnet.py:grid,f30k`."""


def choose(variant: str, *groups: tuple[str, ...]) -> list[str]:
    """The choice from each group by a variant, which names them in any order, separated by commas.

    The first of a group is its default. Raises ValueError for a name that is in no group, or a second one of a group.
    """
    names = [name.strip() for name in variant.split(",") if name.strip()]
    chosen = [[name for name in names if name in group] for group in groups]
    if sum(map(len, chosen)) < len(names) or max(map(len, chosen)) > 1:
        choices = " and ".join(f"one of {', '.join(group)}" for group in groups)
        default = ",".join(group[0] for group in groups)
        raise ValueError(f"variant {variant!r}: expected {choices}; the default is {default}")
    return [named[0] if named else group[0] for named, group in zip(chosen, groups, strict=True)]
