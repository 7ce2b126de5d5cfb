"""GIT's forward pass over plain tensors: Hugging Face's mathematics in fewer operations.

Several texts on one image share its rows. `collect` takes the weights out of a `GitForCausalLM`: query, key and value
as one matrix, the pixels' normalisation inside the patch embedding, a LoRA added to its layer. `prepare` does it once
for a model that is not trained and, on CPUs with AVX-512, brings the matrices into oneDNN's own order. The pass is made
of pure functions of these weights and their inputs, and gradients flow through them. States, scores and gradients equal
Hugging Face's (tests/test_GitText2ActionWithPrompt.py).
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers.activations import GELUActivation, QuickGELUActivation

TEXT_GROUPS = 8  # into which a batch of texts is sorted by length; one of 18 tokens is padded to 37 otherwise
# On CPUs with AVX-512 oneDNN multiplies float32 up to 2.5 times as fast as torch's default, MKL, which takes AVX2 on
# AMD. torch has no public name for these two operators; elsewhere the public `F.linear` does the same.
ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
BFLOAT16 = ONEDNN and torch.cpu.get_capabilities().get("avx512_bf16", False)  # it multiplies bfloat16 twice as fast
ONEDNN_ACTIVATIONS = {None: ("none", [], ""), F.silu: ("swish", [], ""), F.gelu: ("gelu", [], "none")}


class Layer(NamedTuple):
    """One transformer layer: its linear maps as (weight, bias)."""

    qkv: tuple
    out: tuple
    up: tuple
    down: tuple
    activation: Callable
    norm1: tuple  # what F.layer_norm takes after its input
    norm2: tuple


class Weights(NamedTuple):
    """What the pass needs of a GIT model."""

    patch_embedding: tuple  # linear, of a patch's pixels from 0 to 255, channel by channel
    class_embedding: torch.Tensor  # (1, 1, width), its position added
    patch_positions: torch.Tensor  # (patches, width)
    pre_norm: tuple
    vision: list
    vision_heads: int
    post_norm: tuple
    projection: tuple
    projection_norm: tuple
    word_embeddings: torch.Tensor  # (vocabulary, D)
    text_positions: torch.Tensor  # (longest text, D)
    text_norm: tuple
    decoder: list
    decoder_heads: int
    lm_head: tuple
    padding: int  # the token behind texts that are shorter than others


def collect(git, image_processor):
    """The `Weights` of a `GitForCausalLM`; a LoRA that PEFT named "default" is added, W + scaling B A."""

    def linear_of(module):
        weight = module.weight
        if hasattr(module, "get_delta_weight"):
            weight = weight + module.get_delta_weight("default")
        return weight, module.bias

    def norm_of(module):
        return module.normalized_shape, module.weight, module.bias, module.eps

    def joined(*modules):
        return tuple(torch.cat(part) for part in zip(*map(linear_of, modules)))

    def layer_of(qkv, out, up, down, activation, norm1, norm2):
        (up, up_bias), (down, down_bias) = linear_of(up), linear_of(down)
        if isinstance(activation, QuickGELUActivation):  # x sigmoid(1.702 x) = silu(1.702 x) / 1.702
            up, up_bias, down, activation = 1.702 * up, 1.702 * up_bias, down / 1.702, F.silu
        elif isinstance(activation, GELUActivation):
            activation = F.gelu
        maps = joined(*qkv), linear_of(out), (up, up_bias), (down, down_bias)
        return Layer(*maps, activation, norm_of(norm1), norm_of(norm2))

    vision = git.git.image_encoder.vision_model
    patch, positions = vision.embeddings.patch_embedding.weight, vision.embeddings.position_embedding.weight
    mean, std = (
        torch.tensor(x, dtype=patch.dtype, device=patch.device)[:, None, None]
        for x in (image_processor.image_mean, image_processor.image_std)
    )
    projection, projection_norm = git.git.visual_projection.visual_projection
    return Weights(
        patch_embedding=(
            (patch * image_processor.rescale_factor / std).flatten(1),
            -(patch * mean / std).sum((1, 2, 3)),
        ),
        class_embedding=(vision.embeddings.class_embedding + positions[0])[None, None],
        patch_positions=positions[1:],
        pre_norm=norm_of(vision.pre_layrnorm),
        vision=[
            layer_of(
                (x.self_attn.q_proj, x.self_attn.k_proj, x.self_attn.v_proj), x.self_attn.out_proj,
                x.mlp.fc1, x.mlp.fc2, x.mlp.activation_fn, x.layer_norm1, x.layer_norm2,
            )
            for x in vision.encoder.layers
        ],
        vision_heads=vision.config.num_attention_heads,
        post_norm=norm_of(vision.post_layernorm),
        projection=linear_of(projection),
        projection_norm=norm_of(projection_norm),
        word_embeddings=git.git.embeddings.word_embeddings.weight,
        text_positions=git.git.embeddings.position_embeddings.weight,
        text_norm=norm_of(git.git.embeddings.LayerNorm),
        decoder=[
            layer_of(
                (x.attention.self.query, x.attention.self.key, x.attention.self.value), x.attention.output.dense,
                x.intermediate.dense, x.output.dense, x.intermediate.intermediate_act_fn,
                x.attention.output.LayerNorm, x.output.LayerNorm,
            )
            for x in git.git.encoder.layer
        ],
        decoder_heads=git.config.num_attention_heads,
        lm_head=linear_of(git.output),
        padding=git.config.pad_token_id,
    )  # fmt: skip


def prepare(git, image_processor, onednn=ONEDNN):
    """`Weights` of a model that is not trained, its matrices in oneDNN's own order where that is faster.

    Some are copies, some the model's own: prepare them again whenever it has changed.
    """
    with torch.no_grad():
        weights = collect(git, image_processor)
        if not (onednn and weights.patch_positions.device.type == "cpu"):
            return weights

        def pack(matrix):
            return torch.ops.mkldnn._reorder_linear_weight(matrix[0]), matrix[1]

        def pack_layer(layer):
            return layer._replace(qkv=pack(layer.qkv), out=pack(layer.out), up=pack(layer.up), down=pack(layer.down))

        return weights._replace(
            patch_embedding=pack(weights.patch_embedding),
            vision=[pack_layer(layer) for layer in weights.vision],
            projection=pack(weights.projection),
            decoder=[pack_layer(layer) for layer in weights.decoder],
            lm_head=pack(weights.lm_head),
        )


def linear(x, weight, bias, activation=None):
    """`activation(F.linear(x, weight, bias))`, by oneDNN if `prepare` packed the weight for it."""
    if weight.is_mkldnn:
        fused = activation if activation in ONEDNN_ACTIVATIONS else None
        x = torch.ops.mkldnn._linear_pointwise(x, weight, bias, *ONEDNN_ACTIVATIONS[fused])
        activation = None if fused else activation
    else:
        x = F.linear(x, weight, bias)
    return activation(x) if activation else x


def project_qkv(x, weights, count):
    """Queries, keys and values, each (B, heads, T, head size), of the rows x (B, T, D)."""
    return linear(x, *weights).unflatten(-1, (3, count, -1)).permute(2, 0, 3, 1, 4)


def attend(query, key, value, mask=None):
    """Attention, the heads side by side again: (B, T, D)."""
    if query.dtype == torch.bfloat16 and query.device.type == "cpu":  # fused, a training step takes twice as long
        scores = query * query.shape[-1] ** -0.5 @ key.mT
        scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
        mixed = scores.softmax(-1) @ value
    else:
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return mixed.transpose(1, 2).flatten(2)


def cut(pixels, side):
    """Pixels (B, 3, S, S) cut into square patches, row by row: (B, patches, 3 * side * side)."""
    patches = pixels.unfold(2, side, side).unfold(3, side, side)  # (B, 3, rows, columns, side, side)
    return patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def encode_image(w, pixels):
    """The image as the decoder's first rows, (B, 1 + patches, D), of pixels from 0 to 255, float32 (B, 3, S, S)."""
    with torch.autocast(pixels.device.type, enabled=False):  # in bfloat16 pixels that are not centred lose digits
        side = math.isqrt(w.patch_embedding[0].shape[1] // pixels.shape[1])
        patches = linear(cut(pixels, side), *w.patch_embedding) + w.patch_positions
    x = F.layer_norm(torch.cat([w.class_embedding.expand(len(pixels), -1, -1), patches], 1), *w.pre_norm)
    for layer in w.vision:
        x = x + linear(attend(*project_qkv(F.layer_norm(x, *layer.norm1), layer.qkv, w.vision_heads)), *layer.out)
        x = x + linear(linear(F.layer_norm(x, *layer.norm2), *layer.up, layer.activation), *layer.down)
    # .float(): on a CPU, under autocast, the sums of all layers would else be in bfloat16 from here on
    return F.layer_norm(linear(F.layer_norm(x, *w.post_norm), *w.projection).float(), *w.projection_norm)


def embed(w, tokens, start=None):
    """Embedded text (B, T, D) of token ids int64 (B, T), the first of them at position `start` int64 (B,) or 0."""
    positions = torch.arange(tokens.shape[-1], device=tokens.device)
    positions = positions if start is None else start[:, None] + positions
    return F.layer_norm(w.word_embeddings[tokens] + w.text_positions[positions], *w.text_norm)


def decode(w, x, mask=None, cache=None, rows=None):
    """Decoder states of the rows x (B, T, D), and the cache that rows after them attend to.

    `cache` holds (key, value), each (B, heads, rows before, head size), of every layer, as an earlier call returned it.
    `mask` bool (T, rows before + T), or any shape that broadcasts to (B, heads, T, rows before + T), says which row
    sees which; None: all see all. If `rows` int64 (B, R) is given, only these leave the last layer, (B, R, D): with no
    cache and a mask (T, T).
    """
    new_cache = []
    for i, layer in enumerate(w.decoder):
        query, key, value = project_qkv(x, layer.qkv, w.decoder_heads)
        if cache is not None:
            key, value = (torch.cat(pair, 2) for pair in zip(cache[i], (key, value)))
        new_cache.append((key, value))
        if rows is not None and i + 1 == len(w.decoder):
            x = x.take_along_dim(rows[:, :, None], 1)
            query = query.take_along_dim(rows[:, None, :, None], 2)
            mask = None if mask is None else mask[rows][:, None]
        x = F.layer_norm(x + linear(attend(query, key, value, mask), *layer.out), *layer.norm1)
        x = F.layer_norm(x + linear(linear(x, *layer.up, layer.activation), *layer.down), *layer.norm2)
    return x, new_cache


@functools.lru_cache(100)
def prefix_mask(image_rows, text_rows, device):
    """GIT's attention mask: image rows see the image, text rows the image and the text up to themselves."""
    rows = image_rows + text_rows
    mask = torch.ones(rows, rows, dtype=torch.bool, device=device).tril()
    mask[:image_rows, :image_rows] = True
    return mask


def read(w, pixels, tokens, lengths, last=1):
    """One pass over image and text: each text's `last` states, float32 (B, last, D), and the cache.

    `pixels` float32 (B, 3, S, S) from 0 to 255; `tokens` int64 (B, T) are a text for each image, `lengths` int64 (B,)
    how many of them count: behind them is padding, which no row before it sees.
    """
    image = encode_image(w, pixels)
    mask = prefix_mask(image.shape[1], tokens.shape[1], pixels.device)
    rows = image.shape[1] + lengths[:, None] + torch.arange(-last, 0, device=pixels.device)
    states, cache = decode(w, torch.cat([image, embed(w, tokens)], 1), mask, rows=rows)
    return states.float(), cache


def read_image(w, pixels):
    """The cache that texts on images attend to; their own rows need not leave the last layer."""
    image = encode_image(w, pixels)
    return decode(w, image, rows=torch.zeros(len(image), 0, dtype=torch.int64, device=image.device))[1]


def read_texts(w, pixels, tokens):
    """Logits (B, Q, T, vocabulary) of Q texts int64 (B, Q, T) on each of B images, whose rows are computed once.

    Texts of like length are read together, without the padding behind the longest of them, where logits are 0.
    """
    cache = read_image(w, pixels)
    image_rows = cache[0][0].shape[2]
    longest, texts, logits = tokens.shape[-1], tokens.flatten(0, 1), []
    lengths = ((texts != w.padding) * torch.arange(1, longest + 1, device=texts.device)).amax(1)
    order = lengths.argsort()
    images = order // tokens.shape[1]
    # index_select's gradient is faster than that of an index
    seen = [[x.index_select(0, images).chunk(TEXT_GROUPS) for x in layer] for layer in cache]
    for i, group in enumerate(order.chunk(TEXT_GROUPS)):
        text = embed(w, texts[group, : lengths[group[-1]]])
        mask = prefix_mask(image_rows, text.shape[1], text.device)[image_rows:]
        states, _ = decode(w, text, mask, [(keys[i], values[i]) for keys, values in seen])
        logits.append(F.pad(linear(states, *w.lm_head), (0, 0, 0, longest - text.shape[1])))
    return torch.cat(logits).index_select(0, order.argsort()).unflatten(0, tokens.shape[:2])


def multiplies_bfloat16(device):
    """Whether a device is faster in bfloat16: GPUs, and CPUs with an instruction for it."""
    return device.type == "cuda" or BFLOAT16


def mixed_precision(device):
    """Autocast for the forward pass of training: products and attention in bfloat16 where that is faster."""
    return torch.autocast(device.type, torch.bfloat16, enabled=multiplies_bfloat16(device))


def pad_texts(texts, padding_value):
    """Token ids and labels int64 (N, T) of texts, pairs (prompt, ending) of ids; prompts have labels -100."""
    tokens = [torch.tensor(prompt + ending) for prompt, ending in texts]
    labels = [torch.tensor([-100] * len(prompt) + ending) for prompt, ending in texts]
    return pad_sequence(tokens, True, padding_value), pad_sequence(labels, True, -100)


def text_loss(logits, labels):
    """Cross-entropy, the mean over each text's tokens, then over texts; labels (B, Q, T) are -100 elsewhere.

    A short answer counts as much as a long sentence.
    """
    logits, labels = logits[..., :-1, :].float(), labels[..., 1:].to(logits.device)
    losses = F.cross_entropy(logits.flatten(0, 2), labels.flatten(), ignore_index=-100, reduction="none")
    return (losses.view(labels.shape).sum(-1) / (labels != -100).sum(-1)).mean()


def exactly_right(logits, labels):
    """Whether greedy generation would say each text's labels and stop: bool (B, Q)."""
    labels = labels[..., 1:].to(logits.device)
    return ((logits[..., :-1, :].argmax(-1) == labels) | (labels == -100)).all(-1)


def train_by_this_pass(git, image_processor):
    """Make `git(pixel_values, input_ids, labels)` return `text_loss` by `read_texts`, unnoticed by PEFT.

    `pixel_values` are from 0 to 255, as `read` wants them. Nothing is dropped out, whatever the base's config says.
    """

    def forward(pixel_values, input_ids, labels):
        logits = read_texts(collect(git, image_processor), pixel_values, input_ids)
        return {"loss": text_loss(logits, labels)}

    git.forward = forward
    return git


def generate(w, pixels, tokens, lengths, stop, max_tokens):
    """Greedily chosen token ids after a prompt for each image, without `stop` and what follows it: a list of lists.

    `tokens` int64 (B, T) are the prompts, of which `lengths` int64 (B,) count.
    """
    states, cache = read(w, pixels, tokens, lengths)
    rows = cache[0][0].shape[2]
    seen = torch.arange(rows, device=pixels.device) < rows - tokens.shape[1] + lengths[:, None]  # no padding
    said = tokens[:, :0]
    while said.shape[1] < max_tokens and not (said == stop).any(1).all():
        if said.shape[1]:
            seen = F.pad(seen, (0, 1), value=True)
            word = embed(w, said[:, -1:], lengths + said.shape[1] - 1)
            states, cache = decode(w, word, seen[:, None, None], cache)
        with torch.autocast(pixels.device.type, enabled=False):
            word = linear(states[:, -1].float(), *w.lm_head).argmax(-1)
        said = torch.cat([said, word[:, None]], 1)
    return [row[: row.index(stop)] if stop in row else row for row in said.tolist()]
