"""The parameters of a network in groups, stem first, each with a readable name: what gradual unfreezing works on."""

from timm.models import group_parameters
from torch import nn

from selfsup_fastai.encoders.split import SplitBody

TINY = 0.01  # Groups with a smaller share of the parameters are not worth a learning rate of their own


def count(module: nn.Module) -> int:
    """The number of parameters."""
    return sum(p.numel() for p in module.parameters())


def parts(body: nn.Module) -> dict[str, nn.Module]:
    """The parts of a network by name, in order: its children; one that holds nearly everything gives its own."""
    found, most = dict(body.named_children()), 0.9 * count(body)
    while big := next((n for n, m in found.items() if count(m) > most and any(True for _ in m.children())), None):
        inside = {f"{big}.{name}": child for name, child in found[big].named_children()}
        items, at = list(found.items()), list(found).index(big)
        found = dict([*items[:at], *inside.items(), *items[at + 1 :]])
    return found


def grouped_names(body: nn.Module) -> list[list[str]]:
    """Parameter names in groups, stem first, each name once; the tiny groups are merged into a neighbor."""
    if isinstance(body, SplitBody):
        groups = grouped_names(body.lightness)  # the halves are of one make
        return [[f"{half}.{name}" for half in ("lightness", "color") for name in names] for names in groups]
    sizes = {name: p.numel() for name, p in body.named_parameters()}
    tiny = TINY * sum(sizes.values())
    merged, pending = [], []
    for names in _raw_groups(body):
        pending = pending + names
        if sum(sizes[name] for name in pending) >= tiny:
            merged.append(pending)
            pending = []
    merged[-1] += pending
    return merged


def labels(body: nn.Module) -> list[str]:
    """A name for each group of `grouped_names`: 'layer2'; 'blocks.0–2' or 'conv1–layer1' for several parts in one."""
    groups = grouped_names(body.lightness if isinstance(body, SplitBody) else body)
    tops = [top for names in groups for top in {name.split(".")[0] for name in names}]
    divided = {top for top in tops if tops.count(top) > 1}  # Spread over several groups, so their number counts too
    return [_label(_unit(names[0], divided), _unit(names[-1], divided)) for names in groups]


def _raw_groups(body: nn.Module) -> list[list[str]]:
    if hasattr(body, "group_matcher"):
        try:
            return list(group_parameters(body, body.group_matcher(coarse=True)).values())
        except (AssertionError, TypeError):  # Some timm nets have groups in name only, or no coarse ones
            pass
    names = [name for name, _ in body.named_parameters()]
    groups = [[name for name in names if name.startswith(f"{part}.")] for part in parts(body)]
    inside = {name for group in groups for name in group}
    return [[name for name in names if name not in inside], *groups]


def _unit(name: str, divided: set[str]) -> str:
    """The part of the network a parameter is in: 'layer2', or 'blocks.3' of a divided one."""
    top, *rest = name.split(".")
    return ".".join([top, *rest[:1]]) if top in divided else top


def _label(first: str, last: str) -> str:
    if first == last:
        return first
    top, _, number = last.partition(".")
    return f"{first}–{number if top == first.partition('.')[0] else last}"
