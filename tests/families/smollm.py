"""SmolLM 3."""

from families.common import Wrong, other_order, rope, without

MODELS = {
    "smollm3": ("smollm3", {**rope(), "num_hidden_layers": 5, "pad_token_id": None}),
    "smollm3-yarn": (
        "smollm3",
        {
            **rope("yarn", factor=16.0, original_max_position_embeddings=32),
            "num_hidden_layers": 4,
            "pad_token_id": None,
            "tie_word_embeddings": False,
        },
    ),
}
WRONG = [
    Wrong("smollm3", "rope in every layer", config={"no_rope_layers": [1, 1, 1, 1, 1]}),
    Wrong("smollm3", "q and k not permuted", other_order),
    Wrong("smollm3", "rope base", metadata={"rope.freq_base": 10000.0}),
    Wrong("smollm3", "layer norms", without("attn_norm.weight", to=1.0)),
    Wrong("smollm3-yarn", "no rope scaling", metadata={"rope.scaling.type": "none"}),
    Wrong("smollm3-yarn", "embedding for output", left_out="output.weight"),
]
BITS: dict[str, dict[str, object]] = {"smollm3": {}}
