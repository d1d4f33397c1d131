"""Weight rules of linear attention (KDA and gated DeltaNet)."""

from jaxinfer.checkpoint.weight_table import Rule


def kda_rules(layer: str = "model.layers.{i}.self_attn", target: str = "layers.{i}.attention") -> list[Rule]:
    """Return the weight rules of one `layers.kda.KimiDeltaAttention`, by the names on the Hub or in transformers.

    transformers packs the three convolutions into one tensor and names the parts of the forget gate `forget_gate.*`.

    Args:
        layer: prefix of the tensors' names.
        target: path of the module.
    """

    def rule(name: str, path: str, parts: tuple[str, ...] = (), also: str = "") -> Rule:
        return Rule(f"{layer}.{name}", f"{target}.{path}", parts, (f"{layer}.{also}",) if also else ())

    each = tuple(rule(f"{part}_conv1d.weight", "conv", (part,)) for part in "qkv")
    packed = rule("conv1d.weight", "conv", ("q", "k", "v"))
    return [
        *(rule(f"{part}_proj.weight", "projection.weight", (part,)) for part in ("q", "k", "v", "b", "g_a")),
        rule("f_a_proj.weight", "projection.weight", ("f_a",), "forget_gate.f_a_proj.weight"),
        rule("f_b_proj.weight", "gates.weight", ("f_b",), "forget_gate.f_b_proj.weight"),
        rule("g_b_proj.weight", "gates.weight", ("g_b",)),
        Rule(packed.source, packed.target, packed.parts, instead=each),
        rule("A_log", "decay", also="forget_gate.A_log"),
        rule("dt_bias", "decay_bias", also="forget_gate.dt_bias"),
        rule("o_norm.weight", "norm"),
        rule("o_proj.weight", "out.weight"),
    ]


def delta_net_rules(layer: str = "model.layers.{i}.linear_attn", target: str = "layers.{i}.attention") -> list[Rule]:
    """Return the weight rules of one `layers.delta_net.GatedDeltaNet`; arguments as in `kda_rules`."""
    return [
        *(Rule(f"{layer}.in_proj_{part}.weight", f"{target}.projection.weight", (part,)) for part in ("qkvz", "ba")),
        Rule(f"{layer}.conv1d.weight", f"{target}.conv", ("q", "k", "v")),
        Rule(f"{layer}.A_log", f"{target}.decay"),
        Rule(f"{layer}.dt_bias", f"{target}.decay_bias"),
        Rule(f"{layer}.norm.weight", f"{target}.norm"),
        Rule(f"{layer}.out_proj.weight", f"{target}.out.weight"),
    ]
