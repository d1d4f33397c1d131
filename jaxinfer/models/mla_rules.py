"""Weight rules of multi-head latent attention."""

from jaxinfer.checkpoint.weight_table import Rule


def mla_rules(
    layer: str = "model.layers.{i}.self_attn", target: str = "layers.{i}.attention", *, query_rank: bool, bias: bool
) -> list[Rule]:
    """Return the weight rules of one `layers.mla.LatentAttention`.

    Args:
        layer: prefix of the tensors' names.
        target: path of the module.
        query_rank: whether queries have a latent of their own.
        bias: whether the projections to the latents and the output projection have biases.
    """

    def rule(name: str, path: str, *parts: str) -> Rule:
        return Rule(f"{layer}.{name}", f"{target}.{path}", parts)

    table = [
        rule("kv_a_proj_with_mqa.weight", "down.weight", "kv_a"),
        rule("kv_a_layernorm.weight", "norm.scale"),
        rule("kv_b_proj.weight", "up", "kv_b"),
        rule("o_proj.weight", "out.weight"),
    ]
    if query_rank:
        table += [
            rule("q_a_proj.weight", "down.weight", "q_a"),
            rule("q_a_layernorm.weight", "q_norm.scale"),
            rule("q_b_proj.weight", "q_up.weight", "q"),
        ]
    else:
        table.append(rule("q_proj.weight", "down.weight", "q"))
    if bias:
        table += [rule("kv_a_proj_with_mqa.bias", "down.bias", "kv_a"), rule("o_proj.bias", "out.bias")]
    if bias and query_rank:
        table.append(rule("q_a_proj.bias", "down.bias", "q_a"))
    return table
