"""Mixtral."""

from families.common import Wrong, experts_turned, other_order, rope, without

MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "mixtral": ("mixtral", {**rope(), "head_dim": 48, "num_local_experts": 6, "num_experts_per_tok": 2}),
}
WRONG = [
    Wrong("mixtral", "q and k not permuted", other_order),
    Wrong("mixtral", "rope base", metadata={"rope.freq_base": 10000.0}),
    Wrong("mixtral", "experts in another order", experts_turned),
    Wrong("mixtral", "one expert fewer", metadata={"expert_used_count": 1}),
    Wrong("mixtral", "router", without("ffn_gate_inp.weight")),
]
BITS: dict[str, dict[str, object]] = {"mixtral": {"head_dim": 64}}
