"""AQLM 2x8 by the recipe that its paper (arXiv 2401.06118) tells: the authors' converter is in no package registry.

Rows are scaled to length one; two codebooks for groups of 8 begin with k-means of the weights and of what the first
leaves; then rounds of 100 Adam steps on codebooks and scales, and of one sweep that chooses the codes again one after
the other, lower the error of the layer's output until a round gains less than a hundredth. Later blocks are calibrated
on what the quantized blocks before them give. Fine-tuning of blocks, the recipe's last step, is left out.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from exchange import serve, windows_of
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

BOOKS, BITS, GROUP = 2, 8, 8
KMEANS_ROUNDS = 100
ADAM = {"lr": 1e-4, "betas": (0.0, 0.95), "amsgrad": True}
STEPS = 100
ROUNDS = 8  # at most
LEAST_GAIN = 0.01


class Additive(NamedTuple):
    """codes [rows, groups, BOOKS], books [BOOKS, entries, GROUP], scales [rows]."""

    codes: Tensor
    books: Tensor
    scales: Tensor

    def weight(self) -> Tensor:
        groups = sum(book[self.codes[..., number]] for number, book in enumerate(self.books))
        assert isinstance(groups, Tensor)
        return groups.flatten(1) * self.scales[:, None]


@torch.no_grad()
def quantize(request: dict[str, Any]) -> None:
    windows = windows_of(request).to(request["device"])
    model = AutoModelForCausalLM.from_pretrained(request["base"], dtype=torch.float32).to(request["device"])
    model.eval().requires_grad_(False)
    states = model.model.embed_tokens(windows)  # [windows, length, hidden]
    places = torch.arange(windows.shape[1], device=windows.device)[None]
    positions = model.model.rotary_emb(states, places)
    found: dict[str, Additive] = {}
    for number, block in enumerate(model.model.layers):
        linears = {name: layer for name, layer in block.named_modules() if isinstance(layer, nn.Linear)}
        grams = _grams(linears, _outputs(block, states, positions))
        for name, layer in linears.items():
            solved = solve(layer.weight, grams[name])
            layer.weight.copy_(solved.weight())
            found[f"model.layers.{number}.{name}"] = solved
        states = torch.cat(list(_outputs(block, states, positions)))
    save(model, found, Path(request["base"]), Path(request["out"]))


def _outputs(block: nn.Module, states: Tensor, positions: tuple[Tensor, Tensor]) -> Iterator[Tensor]:
    for window in states:
        yield block(window[None], position_embeddings=positions, attention_mask=None)


def _grams(linears: dict[str, nn.Linear], outputs: Iterator[Tensor]) -> dict[str, Tensor]:
    """Sums of the outer products of each layer's inputs, of all windows."""
    grams: dict[str, Tensor] = {}

    def add(name: str, inputs: Tensor) -> None:
        product = inputs.mT @ inputs
        grams[name] = grams[name] + product if name in grams else product

    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: add(name, inputs[0].flatten(0, -2)))
        for name, layer in linears.items()
    ]
    for _ in outputs:
        pass
    for hook in hooks:
        hook.remove()
    return grams


def solve(weight: Tensor, gram: Tensor) -> Additive:
    """The sums of codebook vectors for a layer [rows, columns]."""
    scales = weight.norm(dim=1)
    left = (weight / scales[:, None]).reshape(-1, GROUP)
    books, codes = [], []
    for _ in range(BOOKS):
        book = kmeans(left)
        code = nearest(left, book)
        left = left - book[code]
        books.append(book)
        codes.append(code.view(len(weight), -1))
    best = Additive(torch.stack(codes, -1), torch.stack(books), scales)
    before = loss(weight, gram, best)
    for _ in range(ROUNDS):
        best = sweep(weight, gram, descend(weight, gram, best))
        after = loss(weight, gram, best)
        if after > before * (1 - LEAST_GAIN):
            break
        before = after
    return best


def kmeans(points: Tensor) -> Tensor:
    book = points[torch.randperm(len(points), device=points.device)[: 2**BITS]]
    for _ in range(KMEANS_ROUNDS):
        code = nearest(points, book)
        counts = torch.bincount(code, minlength=len(book))[:, None]
        sums = torch.zeros_like(book).index_add_(0, code, points)
        book = torch.where(counts > 0, sums / counts.clamp(min=1), book)
    return book


def nearest(points: Tensor, book: Tensor) -> Tensor:
    return torch.addmm(book.square().sum(1), points, book.T, alpha=-2).argmin(1)


def loss(weight: Tensor, gram: Tensor, additive: Additive) -> Tensor:
    """Squared error of the layer's outputs."""
    error = weight - additive.weight()
    return ((error @ gram) * error).sum()


def descend(weight: Tensor, gram: Tensor, additive: Additive) -> Additive:
    """Adam on codebooks and scales."""
    with torch.enable_grad():
        books, scales = (tensor.clone().requires_grad_() for tensor in additive[1:])
        optimizer = torch.optim.Adam([books, scales], **ADAM)  # type: ignore[arg-type]
        size = ((weight @ gram) * weight).sum()
        for _ in range(STEPS):
            optimizer.zero_grad()
            (loss(weight, gram, Additive(additive.codes, books, scales)) / size).backward()
            optimizer.step()
    return Additive(additive.codes, books.detach(), scales.detach())


def sweep(weight: Tensor, gram: Tensor, additive: Additive) -> Additive:
    """The best code for each group and book, with all others as they are: beam search with a beam of one."""
    codes, books, scales = additive.codes.clone(), additive.books, additive.scales[:, None]
    pull = (weight - additive.weight()) @ gram  # [rows, columns], kept up as codes change
    for group in torch.randperm(codes.shape[1]).tolist():
        columns = slice(group * GROUP, (group + 1) * GROUP)
        inner = gram[columns, columns]
        for number, book in enumerate(books):
            old = book[codes[:, group, number]]
            wished = pull[:, columns] + scales * (old @ inner)  # without this vector
            cost = scales.square() * ((book @ inner) * book).sum(1) - 2 * scales * (wished @ book.T)
            chosen = cost.argmin(1)
            pull -= scales * ((book[chosen] - old) @ gram[columns])
            codes[:, group, number] = chosen
    return Additive(codes, books, additive.scales)


def save(model: nn.Module, found: dict[str, Additive], base: Path, out: Path) -> None:
    """The checkpoint in the layout that the `aqlm` package reads."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name.removesuffix(".weight") not in found}
    for name, additive in found.items():
        tensors[f"{name}.codes"] = additive.codes.to(torch.uint8).view(torch.int8)
        tensors[f"{name}.codebooks"] = additive.books[:, :, None].half()
        tensors[f"{name}.scales"] = additive.scales[:, None, None, None].half()
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, out / "model.safetensors")
    settings = json.loads((base / "config.json").read_text())
    settings["quantization_config"] = {
        "quant_method": "aqlm",
        "in_group_size": GROUP,
        "out_group_size": 1,
        "num_codebooks": BOOKS,
        "nbits_per_codebook": BITS,
        "linear_weights_not_to_quantize": [name for name in tensors if name.endswith(".weight")],
    }
    (out / "config.json").write_text(json.dumps(settings, indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(base / name, out / name)


if __name__ == "__main__":
    serve(quantize, "torch", "transformers")
