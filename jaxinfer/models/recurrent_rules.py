"""Weight rules of token mixers with a recurrent state (KDA, gated DeltaNet, short convolutions, Mamba-2)."""

from jaxinfer.checkpoint.weight_table import Rule
from jaxinfer.layers.delta_net import DeltaNetSpec
from jaxinfer.layers.kda import KdaSpec
from jaxinfer.layers.mamba import MambaSpec
from jaxinfer.layers.short_conv import ShortConvSpec


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


def delta_net_rules(
    spec: DeltaNetSpec, layer: str = "model.layers.{i}.linear_attn", target: str = "layers.{i}.attention"
) -> list[Rule]:
    """Return the weight rules of one `layers.delta_net.GatedDeltaNet`; other arguments as in `kda_rules`."""
    parts = ("qkvz", "ba") if spec.grouped else ("qkv", "z", "b", "a")
    return [
        *(
            Rule(
                f"{layer}.in_proj_{part}.weight",
                f"{target}.projection.weight",
                tuple(part) if part == "qkv" else (part,),
            )
            for part in parts
        ),
        Rule(f"{layer}.conv1d.weight", f"{target}.conv", ("q", "k", "v")),
        Rule(f"{layer}.A_log", f"{target}.decay"),
        Rule(f"{layer}.dt_bias", f"{target}.decay_bias"),
        Rule(f"{layer}.norm.weight", f"{target}.norm"),
        Rule(f"{layer}.out_proj.weight", f"{target}.out.weight"),
    ]


def short_conv_rules(
    spec: ShortConvSpec, layer: str = "model.layers.{i}.conv", target: str = "layers.{i}.attention"
) -> list[Rule]:
    """Return the weight rules of one `layers.short_conv.ShortConv`; other arguments as in `kda_rules`."""
    table = []
    for kind in ("weight", "bias") if spec.bias else ("weight",):
        table += [
            Rule(f"{layer}.in_proj.{kind}", f"{target}.projection.{kind}", ("b", "c", "x")),
            Rule(f"{layer}.conv.{kind}", f"{target}.{'conv' if kind == 'weight' else 'conv_bias'}", ("x",)),
            Rule(f"{layer}.out_proj.{kind}", f"{target}.out.{kind}"),
        ]
    return table


def mamba_rules(
    spec: MambaSpec, layer: str = "model.layers.{i}.mamba", target: str = "layers.{i}.attention"
) -> list[Rule]:
    """Return the weight rules of one `layers.mamba.Mamba`; other arguments as in `kda_rules`."""
    table = [
        Rule(f"{layer}.in_proj.weight", f"{target}.projection.weight", ("z", "x", "b", "c", "dt")),
        Rule(f"{layer}.conv1d.weight", f"{target}.conv", ("x", "b", "c")),
        Rule(f"{layer}.A_log", f"{target}.decay"),
        Rule(f"{layer}.dt_bias", f"{target}.step_bias"),
        Rule(f"{layer}.D", f"{target}.skip"),
        Rule(f"{layer}.out_proj.weight", f"{target}.out.weight"),
    ]
    if spec.in_bias:
        table.append(Rule(f"{layer}.in_proj.bias", f"{target}.projection.bias", ("z", "x", "b", "c", "dt")))
    if spec.conv_bias:
        table.append(Rule(f"{layer}.conv1d.bias", f"{target}.conv_bias", ("x", "b", "c")))
    if spec.norm_eps is not None:
        table.append(Rule(f"{layer}.norm.weight", f"{target}.norm", ("x",)))
    if spec.out_bias:
        table.append(Rule(f"{layer}.out_proj.bias", f"{target}.out.bias"))
    return table


def recurrent_rules(spec: KdaSpec | DeltaNetSpec | ShortConvSpec | MambaSpec) -> list[Rule]:
    """Return the weight rules of a layer's token mixer."""
    if isinstance(spec, KdaSpec):
        return kda_rules()
    if isinstance(spec, DeltaNetSpec):
        return delta_net_rules(spec)
    return mamba_rules(spec) if isinstance(spec, MambaSpec) else short_conv_rules(spec)
