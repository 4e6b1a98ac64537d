"""The groups and the foldable scales of some transformers models, derived by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tracing_zoo.groups import Axis, at, axis, whole

__all__ = ["EXPECTED", "FOLDS"]

Place = tuple[str, int, str, int]
Fold = tuple[str, frozenset[str]]


def pair(*paths: str, dim: int = 0) -> list[str]:
    """Weight and bias of each path."""
    return [f"{path}.{tensor}:{0 if tensor == 'bias' else dim}"
            for path in paths for tensor in ("weight", "bias")]  # fmt: skip


def rows(path: str, layout: str, *, bias: bool = True, dim: int = 0) -> list[Place]:
    """The rows of a weight, and the same of its bias."""
    found = [at(f"{path}.weight", dim, layout)]
    return [*found, at(f"{path}.bias", 0, layout)] if bias else found


# --- decoders with rotary embeddings: 12 heads of 10 on 4 --------------------------------------


def rotary(*, normed: bool = False, moe: tuple[int, ...] = (), experts: str = "mlp.experts",
           router: str = "mlp.gate") -> list[Axis]:  # fmt: skip
    """Llama, Qwen3 and Qwen3-MoE: rotations turn coordinates i and i + 5 of a head by one angle."""
    residual = ["model.embed_tokens.weight:1", "model.norm.weight:0", "lm_head.weight:1"]
    norms = ["model.norm"]
    angles = [at("model.rotary_emb.inv_freq", 0)]
    head_norms: list[str] = []
    groups: list[Axis] = []
    for i in (0, 1):
        layer = f"model.layers.{i}"
        a, m = f"{layer}.self_attn", f"{layer}.mlp"
        q, k, v, o = (f"{a}.{p}_proj.weight" for p in "qkvo")
        norms += [f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm"]
        residual += [f"{q}:1", f"{k}:1", f"{v}:1", f"{o}:0"]
        residual += [f"{norm}.weight:0" for norm in norms[-2:]]
        angles += [at(q, 0, "12 2 n"), at(k, 0, "4 2 n")]
        if normed:
            head_norms += [f"{a}.q_norm", f"{a}.k_norm"]
            angles += [at(f"{a}.{p}_norm.weight", 0, "2 n") for p in "qk"]
        groups += [
            axis(4, [at(q, 0, "n 3 10"), at(k, 0, "n 10"), at(v, 0, "n 10"), at(o, 1, "n 3 10")]),
            axis(3, [at(q, 0, "4 n 10"), at(o, 1, "4 n 10")]),
            axis(10, [at(v, 0, "4 n"), at(o, 1, "12 n")]),
        ]
        if i in moe:
            e = f"{layer}.{experts}"
            residual += [f"{e}.gate_up_proj:2", f"{e}.down_proj:1", f"{layer}.{router}.weight:1"]
            groups.append(axis(20, [at(f"{e}.gate_up_proj", 1, "2 n"), at(f"{e}.down_proj", 2)]))
        else:
            gate, up, down = (f"{m}.{p}_proj.weight" for p in ("gate", "up", "down"))
            residual += [f"{gate}:1", f"{up}:1", f"{down}:0"]
            groups.append(axis(22, whole(f"{gate}:0", f"{up}:0", f"{down}:1")))
    return [
        axis(36, whole(*residual), norms=tuple(norms)),
        axis(5, angles, norms=tuple(head_norms)),
        *groups,
    ]


# --- heads of 6, four of them ------------------------------------------------------------------


def heads(q: str, k: str, v: str, o: str) -> list[Axis]:
    """Attention without rotations: heads, what keys and queries share, what values carry."""
    columns = f"{o}.weight"
    return [
        axis(4, [p for path in (q, k, v) for p in rows(path, "n 6")] + [at(columns, 1, "n 6")]),
        axis(6, [*rows(q, "4 n"), *rows(k, "4 n")]),
        axis(6, [*rows(v, "4 n"), at(columns, 1, "4 n")]),
    ]


def bert() -> list[Axis]:
    e, norms = "bert.embeddings", ["bert.embeddings.LayerNorm"]
    tables = ("word_embeddings", "position_embeddings", "token_type_embeddings")
    residual = [*(f"{e}.{table}.weight:1" for table in tables), "bert.pooler.dense.weight:1"]
    groups = [axis(24, whole(*pair("bert.pooler.dense"), "classifier.weight:1"))]
    for i in (0, 1):
        layer = f"bert.encoder.layer.{i}"
        q, k, v = (f"{layer}.attention.self.{p}" for p in ("query", "key", "value"))
        o, up, down = (f"{layer}.{p}.dense" for p in ("attention.output", "intermediate", "output"))
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
        residual += [f"{path}.weight:1" for path in (q, k, v, up)] + pair(o, down)
        groups += [*heads(q, k, v, o), axis(22, whole(*pair(up), f"{down}.weight:1"))]
    return [axis(24, whole(*residual, *pair(*norms)), norms=tuple(norms)), *groups]


def vit() -> list[Axis]:
    e, norms = "vit.embeddings", ["vit.layernorm"]
    residual = [f"{e}.cls_token:2", f"{e}.position_embeddings:2", "classifier.weight:1"]
    residual += pair(f"{e}.patch_embeddings.projection")
    groups: list[Axis] = []
    for i in (0, 1):
        layer = f"vit.layers.{i}"
        q, k, v, o = (f"{layer}.attention.{p}_proj" for p in "qkvo")
        up, down = f"{layer}.mlp.fc1", f"{layer}.mlp.fc2"
        norms += [f"{layer}.layernorm_before", f"{layer}.layernorm_after"]
        residual += [f"{path}.weight:1" for path in (q, k, v, up)] + pair(o, down)
        groups += [*heads(q, k, v, o), axis(22, whole(*pair(up), f"{down}.weight:1"))]
    return [axis(24, whole(*residual, *pair(*norms)), norms=tuple(norms)), *groups]


def gpt2() -> list[Axis]:
    """Weights are transposed, queries, keys and values are one, the head is the embedding."""
    norms = ["transformer.ln_f"]
    residual = ["transformer.wte.weight:1", "transformer.wpe.weight:1"]
    groups: list[Axis] = []
    for i in (0, 1):
        block = f"transformer.h.{i}"
        qkv, o = f"{block}.attn.c_attn", f"{block}.attn.c_proj"
        up, down = f"{block}.mlp.c_fc", f"{block}.mlp.c_proj"
        norms += [f"{block}.ln_1", f"{block}.ln_2"]
        residual += [f"{qkv}.weight:0", f"{up}.weight:0", *pair(o, down, dim=1)]

        def packed(layout: str, *starts: int, qkv: str = qkv) -> list[Place]:
            return [
                at(name, dim, layout, start=start)
                for name, dim in ((f"{qkv}.weight", 1), (f"{qkv}.bias", 0))
                for start in starts
            ]

        groups += [
            axis(4, [*packed("n 6", 0, 24, 48), at(f"{o}.weight", 0, "n 6")]),
            axis(6, packed("4 n", 0, 24)),
            axis(6, [*packed("4 n", 48), at(f"{o}.weight", 0, "4 n")]),
            axis(22, whole(*pair(up, dim=1), f"{down}.weight:0")),
        ]
    return [axis(24, whole(*residual, *pair(*norms)), norms=tuple(norms)), *groups]


def t5() -> list[Axis]:
    """The residual streams are not free: the embedding ties them, the encoder's is an output.

    The position bias of the first block is added in all, so all of them permute their heads alike.
    For the decoder's attention to the encoder that bias is a zero per head, but it is there.
    """
    groups: list[Axis] = []
    for side in ("encoder", "decoder"):
        bias = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        own, cross = [at(bias, 1)], []
        for i in (0, 1):
            block = f"{side}.block.{i}.layer"
            attention = {f"{block}.0.SelfAttention": own}
            if side == "decoder":
                attention[f"{block}.1.EncDecAttention"] = cross
            for a, joint in attention.items():
                q, k, v, o = (f"{a}.{p}.weight" for p in "qkvo")
                joint += [*(at(w, 0, "n 10") for w in (q, k, v)), at(o, 1, "n 10")]
                groups.append(axis(10, [at(q, 0, "6 n"), at(k, 0, "6 n")]))
                groups.append(axis(10, [at(v, 0, "6 n"), at(o, 1, "6 n")]))
            mlp = f"{block}.{len(attention)}.DenseReluDense"
            groups.append(axis(22, whole(f"{mlp}.wi.weight:0", f"{mlp}.wo.weight:1")))
        groups += [axis(6, joint) for joint in (own, cross) if joint]
    return groups


# --- convolutions ------------------------------------------------------------------------------


def resnet() -> list[Axis]:
    """Bottlenecks, one in the first stage and two in the second; three convolutions in each."""

    def unit(path: str) -> list[str]:
        norm = ("weight", "bias", "running_mean", "running_var")
        return [f"{path}.convolution.weight:0", *(f"{path}.normalization.{t}:0" for t in norm)]

    def reads(path: str) -> str:
        return f"{path}.convolution.weight:1"

    stages = "resnet.encoder.stages"
    blocks = (f"{stages}.0.layers.0", f"{stages}.1.layers.0", f"{stages}.1.layers.1")
    groups: list[Axis] = []
    for block, inner in zip(blocks, (4, 6, 6), strict=True):
        for i in (0, 1):
            members = [*unit(f"{block}.layer.{i}"), reads(f"{block}.layer.{i + 1}")]
            groups.append(axis(inner, whole(*members)))
    one, two, three = blocks
    return [
        *groups,
        axis(6, whole(*unit("resnet.embedder.embedder"), reads(f"{one}.layer.0"),
                      reads(f"{one}.shortcut"))),
        axis(16, whole(*unit(f"{one}.layer.2"), *unit(f"{one}.shortcut"), reads(f"{two}.layer.0"),
                       reads(f"{two}.shortcut"))),
        axis(24, whole(*unit(f"{two}.layer.2"), *unit(f"{two}.shortcut"), reads(f"{three}.layer.0"),
                       *unit(f"{three}.layer.2"), "classifier.1.weight:1")),
    ]  # fmt: skip


EXPECTED: Mapping[str, Callable[[], list[Axis]]] = {
    "llama": rotary,
    "qwen3": lambda: rotary(normed=True),
    "qwen3_moe": lambda: rotary(normed=True, moe=(0,)),
    "bert": bert,
    "vit": vit,
    "gpt2": gpt2,
    "t5": t5,
    "resnet": resnet,
}


# --- foldable scales ---------------------------------------------------------------------------


def llama_folds() -> set[Fold]:
    found: set[Fold] = {("model.norm", frozenset({"lm_head"}))}
    for i in (0, 1):
        layer = f"model.layers.{i}"
        a, m = f"{layer}.self_attn", f"{layer}.mlp"
        found |= {
            (f"{layer}.input_layernorm", frozenset(f"{a}.{p}_proj" for p in "qkv")),
            (f"{layer}.post_attention_layernorm", frozenset({f"{m}.gate_proj", f"{m}.up_proj"})),
            (f"{m}.up_proj", frozenset({f"{m}.down_proj"})),
            (f"{a}.v_proj", frozenset({f"{a}.o_proj"})),
        }
    return found


def bert_folds() -> set[Fold]:
    """Post-norm: what a norm writes is added to the stream too, so only values can be scaled."""
    layers = (f"bert.encoder.layer.{i}.attention" for i in (0, 1))
    return {(f"{a}.self.value", frozenset({f"{a}.output.dense"})) for a in layers}


def gpt2_folds() -> set[Fold]:
    found: set[Fold] = set()
    for block in (f"transformer.h.{i}" for i in (0, 1)):
        found.add((f"{block}.ln_1", frozenset({f"{block}.attn.c_attn"})))
        found.add((f"{block}.ln_2", frozenset({f"{block}.mlp.c_fc"})))
    return found


def resnet_folds() -> set[Fold]:
    """ReLU lets positive scales pass."""
    stages = "resnet.encoder.stages"
    blocks = (f"{stages}.0.layers.0", f"{stages}.1.layers.0", f"{stages}.1.layers.1")
    found = {
        (f"{block}.layer.{i}.normalization", frozenset({f"{block}.layer.{i + 1}.convolution"}))
        for block in blocks
        for i in (0, 1)
    }
    readers = {f"{blocks[0]}.layer.0.convolution", f"{blocks[0]}.shortcut.convolution"}
    return found | {("resnet.embedder.embedder.normalization", frozenset(readers))}


FOLDS: Mapping[str, Callable[[], set[Fold]]] = {
    "llama": llama_folds,
    "qwen3": llama_folds,
    "bert": bert_folds,
    "gpt2": gpt2_folds,
    "resnet": resnet_folds,
}
