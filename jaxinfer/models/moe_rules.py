"""Weight rules of a mixture of experts.

Checkpoints store experts one by one (`experts.3.gate_proj.weight`, as on the Hub) or stacked (`experts.gate_up_proj`
`[E, 2F, M]` with the gate's rows first and `experts.down_proj` `[E, M, F]`, as written by transformers).
"""

from dataclasses import dataclass

from jaxinfer.checkpoint.weight_table import Rule
from jaxinfer.layers.moe import MoEConfig


@dataclass(frozen=True)
class MoENames:
    """Checkpoint names of the parts of a mixture, below the layer's prefix."""

    prefixes: tuple[str, ...] = ("mlp",)
    """Alternative prefixes of the mixture; a checkpoint uses one of them."""
    gate: str = "gate_proj"
    """Name of each expert's gate projection; likewise `up` and `down`."""
    up: str = "up_proj"
    down: str = "down_proj"
    router: str = "gate"
    shared: str = "shared_experts"
    shared_gate: str = "shared_expert_gate"


def moe_rules(
    config: MoEConfig, names: MoENames, layer: str = "model.layers.{i}", target: str = "layers.{i}.mlp"
) -> list[Rule]:
    """Return the weight rules of one mixture of experts.

    Args:
        config: shape of the mixture.
        names: checkpoint names of its parts.
        layer: prefix of the tensors' names.
        target: path of the `layers.moe.MoE`.
    """

    def rule(
        name: str, path: str, parts: tuple[str, ...] = (), index: int | None = None, instead: tuple[Rule, ...] = ()
    ) -> Rule:
        source, *also = (f"{layer}.{prefix}.{name}" for prefix in names.prefixes)
        return Rule(source, f"{target}.{path}", parts, tuple(also), index, instead)

    def experts(stacked: str, path: str, parts: dict[str, str]) -> list[Rule]:
        outputs = tuple(part for part in parts if part)
        found = []
        for kind, ending in ("weight", ""), *([("bias", "_bias")] if config.bias else []):
            each = tuple(
                rule(f"experts.{e}.{name}.{kind}", f"{path}.{kind}", (part,) if part else (), e)
                for e in range(config.experts)
                for part, name in parts.items()
            )
            found.append(rule(f"experts.{stacked}{ending}", f"{path}.{kind}", outputs, instead=each))
        return found

    table = [
        rule(f"{names.router}.weight", "router.weight"),
        *(
            experts("gate_up_proj", "gate_up", {"gate": names.gate, "up": names.up})
            if config.gated
            else experts("up_proj", "gate_up", {"up": names.up})
        ),
        *experts("down_proj", "down", {"": names.down}),
    ]
    if config.router.bias:
        table.append(rule(f"{names.router}.bias", "router.bias"))
    if config.router.input_norm is not None:
        table.append(rule(f"{names.router}.scale", "router.scale"))
    if config.router.expert_scale:
        table.append(rule(f"{names.router}.per_expert_scale", "router.expert_scale"))
    if config.router.correction:
        table.append(rule(f"{names.router}.e_score_correction_bias", "router.correction"))
    if config.shared:
        for part in ("gate", "up") if config.gated else ("up",):
            table.append(rule(f"{names.shared}.{part}_proj.weight", "shared.gate_up.weight", (part,)))
        table.append(rule(f"{names.shared}.down_proj.weight", "shared.down.weight"))
    if config.shared_gate:
        table.append(rule(f"{names.shared_gate}.weight", "shared_gate"))
    return table
