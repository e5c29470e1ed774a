"""Ways in which a critic's folder can be wrong, each with what the refusal must say.

Folders are made by `models.write_critic(mlp=8)` and `models.write_native_critic`, and then spoilt.
"""

import json
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

CARD, CONFIG = "critic.json", "backbone/config.json"
HEAD, WEIGHTS = "head.safetensors", "backbone/model.safetensors"
INDEX = "backbone/model.safetensors.index.json"
DEEP = 20_000


class Fault(NamedTuple):
    """Spoils a folder; `says` is a regular expression that the refusal matches."""

    name: str
    spoil: Callable[[Path], object]
    says: str


# -- how to spoil


def in_turn(*steps: Callable[[Path], object]) -> Callable[[Path], object]:
    """One after the other."""

    def spoil(folder: Path) -> None:
        for step in steps:
            step(folder)

    return spoil


def removed(file: str) -> Callable[[Path], object]:
    return lambda folder: (folder / file).unlink()


def written(file: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_bytes(content)


def changed(file: str, **fields: Any) -> Callable[[Path], object]:
    """With these fields of a JSON file set; NaN and Infinity are written as Python writes them."""

    def spoil(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return spoil


def without(file: str, field: str) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != field}))

    return spoil


def inserted(file: str, text: str) -> Callable[[Path], object]:
    """With this text behind the first brace of a JSON file."""

    def spoil(folder: Path) -> None:
        path = folder / file
        path.write_text("{" + text + "," + path.read_text().lstrip()[1:])

    return spoil


def tensors(file: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    """With the tensors of a safetensors file changed in place."""

    def spoil(folder: Path) -> None:
        held = {name: value.clone() for name, value in load_file(folder / file).items()}
        change(held)
        save_file({name: value.contiguous() for name, value in held.items()}, folder / file, {"format": "pt"})

    return spoil


def first_value(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda held: held[name].view(-1)[:1].fill_(value)


def header(file: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """With the header of a safetensors file changed, and its data as they were."""

    def spoil(folder: Path) -> None:
        content = (folder / file).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        entries = json.loads(content[8 : 8 + length])
        change(entries)
        again = json.dumps(entries).encode()
        (folder / file).write_bytes(struct.pack("<Q", len(again)) + again + content[8 + length :])

    return spoil


def cut(file: str, keep: int) -> Callable[[Path], object]:
    return lambda folder: os.truncate(folder / file, keep)


def prefixed(file: str, prefix: bytes) -> Callable[[Path], object]:
    """With the first bytes of a file replaced."""

    def spoil(folder: Path) -> None:
        (folder / file).write_bytes(prefix + (folder / file).read_bytes()[len(prefix) :])

    return spoil


def piped(file: str) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        os.mkfifo(folder / file)

    return spoil


def linked(file: str, target: str | None = None) -> Callable[[Path], object]:
    """A link to a file outside in its place; to its own content there unless another target is named."""

    def spoil(folder: Path) -> None:
        outside = folder.parent / f"{folder.name}-outside"
        (folder / file).rename(outside)
        (folder / file).symlink_to(target or outside)

    return spoil


def socketed(file: str) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        here = os.getcwd()
        os.chdir(folder)  # a socket's path may have 107 bytes
        try:
            with socket.socket(socket.AF_UNIX) as one:
                one.bind(file)
        finally:
            os.chdir(here)

    return spoil


def sharded(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """The weights behind an index, which is then changed."""

    def spoil(folder: Path) -> None:
        names = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).rename(folder / "backbone" / "model-00001-of-00001.safetensors")
        index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
        change(index)
        (folder / INDEX).write_text(json.dumps(index))

    return spoil


def _overlap(entries: dict[str, Any]) -> None:
    first, second, *_ = (entry for name, entry in entries.items() if name != "__metadata__")
    second["data_offsets"] = first["data_offsets"]


def _retype(entries: dict[str, Any]) -> None:
    next(entry for name, entry in entries.items() if name != "__metadata__")["dtype"] = "I32"


def _many(folder: Path) -> None:
    for number in range(1001):
        (folder / f"note-{number}").touch()


# -- what both kinds share


def _of_card() -> list[Fault]:
    def card(name: str, says: str, /, **fields: Any) -> Fault:
        return Fault(f"card: {name}", changed(CARD, **fields), rf"critic\.json: {says}")

    def raw(name: str, says: str, content: bytes) -> Fault:
        return Fault(f"card: {name}", written(CARD, content), rf"critic\.json: {says}")

    inf, nan, wide = float("inf"), float("nan"), {"kind": "categorical"}
    return [
        *(
            Fault(f"card: no {field}", without(CARD, field), rf"critic\.json: .*{field}")
            for field in ("name", "version", "head", "distribution")
        ),
        *(
            card(f"{field} is {value!r:.20}", field, **{field: value})
            for field in ("name", "version")
            for value in ("", "x/y", "../x", "a..b", "a@b", ".a", "a b", "a\n", "a\0", "é", "a" * 65, 1, None, ["a"])
        ),
        card("format 2", "format", format=2),
        card("format true", "format", format="1"),
        card("head W", "head", head="W"),
        card("head null", "head", head=None),
        card("head a list", "head", head=["V"]),
        card("distribution a string", "distribution", distribution="bernoulli"),
        card("distribution unknown", "distribution", distribution={"kind": "normal"}),
        card("distribution with more", "distribution", distribution={"kind": "bernoulli", "p": 1}),
        card("no atoms", "distribution", distribution=wide),
        card("one atom", "distribution", distribution={**wide, "atoms": [0]}),
        card("atoms NaN", "NaN", distribution={**wide, "atoms": [0, nan]}),
        card("atoms text", "distribution", distribution={**wide, "atoms": ["0", "1"]}),
        card("atoms true", "distribution", distribution={**wide, "atoms": [False, True]}),
        card("atoms nested", "distribution", distribution={**wide, "atoms": [[0], [1]]}),
        card("atoms too many", "distribution", distribution={**wide, "atoms": [i / 5000 for i in range(5001)]}),
        card("atoms too large", "distribution", distribution={**wide, "atoms": [0, 1e300]}, reward_range=[0, 1e300]),
        card("atoms that another head has", "", distribution={**wide, "atoms": [0, 0.5, 1]})._replace(
            says=r"head\.safetensors: \S+ has shape"
        ),
        card("range infinite", "Infinity", reward_range=[0, inf]),
        card("range too large", "reward_range", reward_range=[-1e300, 1e300]),
        card("range descends", "the file: .*reward_range", reward_range=[1, 0]),
        card("range of three", "reward_range", reward_range=[0, 1, 2]),
        card("range of text", "reward_range", reward_range=["0", "1"]),
        card("range a number", "reward_range", reward_range=1),
        card("mlp a number", "mlp", mlp=8),
        card("mlp of no width", "mlp", mlp={}),
        card("mlp negative", "mlp.width", mlp={"width": -8}),
        card("mlp zero", "mlp.width", mlp={"width": 0}),
        card("mlp true", "mlp.width", mlp={"width": True}),
        card("mlp fraction", "mlp.width", mlp={"width": 8.5}),
        card("mlp text", "mlp.width", mlp={"width": "8"}),
        card("mlp huge", "mlp.width", mlp={"width": 10**12}),
        card("mlp of another width", "", mlp={"width": 9})._replace(says=r"head\.safetensors: \S+ has shape"),
        card("mlp of a million", "", mlp={"width": 2**20})._replace(says=r"head\.safetensors:"),
        card("mlp activation", "mlp.activation", mlp={"width": 8, "activation": "relu"}),
        card("borrow text", "borrow", borrow="input_embeddings"),
        card("borrow unknown", "borrow", borrow=["lm_head"]),
        card("eta zero", "recommended_eta", recommended_eta=0),
        card("eta negative", "recommended_eta", recommended_eta=-1),
        card("eta NaN", "NaN", recommended_eta=nan),
        card("eta huge", "recommended_eta", recommended_eta=1e300),
        card("eta text", "recommended_eta", recommended_eta="0.1"),
        card("eta true", "recommended_eta", recommended_eta=True),
        card("fingerprint", "tokenizer_fingerprint", tokenizer_fingerprint="x"),
        card("fingerprint of a number", "tokenizer_fingerprint", tokenizer_fingerprint=5),
        card("hidden without backbone", "", hidden="first")._replace(says=r"critic\.json: hidden"),
        card("backbone elsewhere", "backbone", backbone="hub/model"),
        card("made_for text", "made_for", made_for="x"),
        card("a note of NaN", "NaN", metrics={"auc": nan}),
        raw("empty", "", b""),
        raw("a list", "is no JSON object", b"[]"),
        raw("a number", "is no JSON object", b"1"),
        raw("null", "is no JSON object", b"null"),
        raw("cut", "", b'{"format": 1, "name": "a'),
        raw("not UTF-8", "'utf-8'", b'{"name": "\xff\xfe"}'),
        raw("UTF-16", "'utf-8'", '{"name": "a"}'.encode("utf-16")),
        raw("with a byte-order mark", "", b"\xef\xbb\xbf{}"),
        raw("nested lists", "is nested", b"[" * DEEP + b"]" * DEEP),
        raw("nested objects", "is nested", b'{"a":' * DEEP + b"1" + b"}" * DEEP),
        raw("too large", "", b'{"name": "' + b"a" * 2**20 + b'"}')._replace(says=r"critic\.json has more than"),
        Fault("card: a key twice", inserted(CARD, '"name": "other"'), r"critic\.json: has the key 'name' twice"),
        Fault("card: a note nested", inserted(CARD, f'"x": {"[" * DEEP}{"]" * DEEP}'), r"critic\.json: is nested"),
        Fault("card: a note of many digits", inserted(CARD, f'"x": {"9" * 5000}'), r"critic\.json: the integer 999"),
        Fault("card: a note too large", inserted(CARD, '"x": 1e999'), r"critic\.json: the number 1e999"),
        Fault("card: half a character", inserted(CARD, '"x": "\\ud800"'), r"critic\.json: .*surrogate"),
        Fault("card: missing", removed(CARD), r"critic\.json cannot be read"),
        Fault("card: a pipe", piped(CARD), r"critic\.json is no regular file"),
        Fault("card: a socket", in_turn(removed(CARD), socketed(CARD)), r"critic\.json cannot be read"),
        Fault("card: a folder", in_turn(removed(CARD), lambda f: (f / CARD).mkdir()), r"critic\.json"),
        Fault("card: a link out", linked(CARD), r"critic\.json leads out"),
        Fault("card: a link to a device", linked(CARD, "/dev/zero"), r"critic\.json leads out"),
        Fault("card: a link to itself", in_turn(removed(CARD), lambda f: (f / CARD).symlink_to(CARD)), r"critic\.json"),
        Fault("too many files", _many, "more than 1000 files"),
        Fault("a pipe beside", piped("note"), r"note is no regular file"),
        Fault("a socket beside", socketed("note"), r"note is no regular file"),
        Fault("a link to nowhere", lambda f: (f / "note").symlink_to("nowhere"), r"cannot be read"),
    ]


def _of_tensors(file: str, name: str) -> list[Fault]:
    """Of a safetensors file with a tensor of that name."""
    end = file.rpartition("/")[2].replace(".", r"\.")

    def one(what: str, spoil: Callable[[Path], object], says: str = end) -> Fault:
        return Fault(f"{file}: {what}", spoil, says)

    huge = {"big": {"dtype": "F32", "shape": [2**31, 2**31], "data_offsets": [0, 4]}}
    return [
        one("missing", removed(file)),
        one("a pipe", piped(file), f"{end} is no regular file"),
        one("a link out", linked(file), f"{end} leads out"),
        one("empty", cut(file, 0)),
        one("seven bytes", cut(file, 7)),
        one("cut in the header", cut(file, 100)),
        one("cut in the data", lambda f: os.truncate(f / file, (f / file).stat().st_size - 4)),
        one("more behind", lambda f: (f / file).write_bytes((f / file).read_bytes() + b"0" * 64)),
        one("a header that says it has 2**63 bytes", prefixed(file, struct.pack("<Q", 2**63)), f"{end}: its header"),
        one("a header that says it has 100 MB", prefixed(file, struct.pack("<Q", 10**8)), f"{end}: its header"),
        one("a header longer than the file", prefixed(file, struct.pack("<Q", 2**22))),
        one("a header shorter than it is", prefixed(file, struct.pack("<Q", 20))),
        one("a header nested", written(file, struct.pack("<Q", 2 * DEEP) + b"[" * DEEP + b"]" * DEEP)),
        one("a header that is no JSON", written(file, struct.pack("<Q", 4) + b"\xff\xfe{}")),
        one("a pickle", written(file, b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00." * 4)),
        one("text", written(file, b"hello")),
        one("offsets that overlap", header(file, _overlap)),
        one("a shape that overflows", header(file, lambda entries: entries.update(huge))),
        one("another dtype in the header", header(file, _retype)),
        one("half a dtype", tensors(file, lambda h: h.update({name: h[name].half().view(torch.int16)})), "dtype I16"),
        one("integers", tensors(file, lambda h: h.update({name: h[name].long()})), f"{end}: .* has dtype I64"),
        one("booleans", tensors(file, lambda h: h.update({name: h[name] > 0})), f"{end}: .* has dtype BOOL"),
        one("NaN", tensors(file, first_value(name, float("nan"))), f"{name}' is not finite"),
        one("infinity", tensors(file, first_value(name, float("inf"))), f"{name}' is not finite"),
        one("minus infinity", tensors(file, first_value(name, float("-inf"))), f"{name}' is not finite"),
        one(
            "doubles too large for float32",
            tensors(file, lambda h: h.update({name: h[name].double().fill_(1e300)})),
            f"{name}' is not finite in float32",
        ),
        one("a tensor less", tensors(file, lambda h: h.pop(name)), f"missing: .*{name}"),
        one("a tensor more", tensors(file, lambda h: h.update(other=torch.ones(3))), "other"),
        one("transposed", tensors(file, lambda h: h.update({name: h[name].mT})), f"{name} has shape"),
        one(
            "a row more", tensors(file, lambda h: h.update({name: torch.cat([h[name], h[name]])})), f"{name} has shape"
        ),
        one("a dimension more", tensors(file, lambda h: h.update({name: h[name][None]})), f"{name} has shape"),
        one("nothing in a tensor", tensors(file, lambda h: h.update({name: h[name][:0]})), f"{name} has shape"),
    ]


# -- separate critics


def _of_config() -> list[Fault]:
    def config(name: str, says: str, /, **fields: Any) -> Fault:
        return Fault(f"config: {name}", changed(CONFIG, **fields), rf"config\.json.*{says}")

    def raw(name: str, content: bytes) -> Fault:
        return Fault(f"config: {name}", written(CONFIG, content), r"config\.json: ")

    nan = float("nan")
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    return [
        *(config(f"{size} {value!r:.20}", size, **{size: value}) for size in sizes for value in (0, -1, True, None)),
        *(config(f"{size} is text", "", **{size: "64"}) for size in sizes),
        *(config(f"{size} a list", "", **{size: [64]}) for size in sizes),
        *(config(f"{size} NaN", "NaN", **{size: nan}) for size in sizes),
        *(config(f"{size} 10**12", size, **{size: 10**12}) for size in sizes),
        config("a layer more", "", num_hidden_layers=3)._replace(says="weights are missing: layers.2"),
        config("a layer less", "", num_hidden_layers=1)._replace(says="no place for weights: layers.1"),
        config("1,000 layers", "more than .* parts", num_hidden_layers=1000),
        config("a vocabulary of a million", "", vocab_size=10**6)._replace(says="embed_tokens.weight has shape"),
        config("another width", "", hidden_size=128)._replace(says="has shape"),
        config("another feed-forward width", "", intermediate_size=97)._replace(says="has shape"),
        config("a feed-forward of 0.9 GB a layer", "", intermediate_size=2**20)._replace(says="has shape"),
        config("a negative feed-forward width", "", intermediate_size=-96),
        config("heads that do not divide the width", "", num_attention_heads=7)._replace(says="backbone"),
        config("no key-value heads", "", num_key_value_heads=0)._replace(says="backbone"),
        config("more key-value heads", "", num_key_value_heads=2)._replace(says="has shape"),
        config("wide heads", "", head_dim=2**20)._replace(says="has shape"),
        config("negative heads", "", head_dim=-32),
        config("positions 0", "max_position_embeddings", max_position_embeddings=0),
        config("positions text", "max_position_embeddings", max_position_embeddings="1024"),
        config("positions huge", "max_position_embeddings", max_position_embeddings=10**17),
        config("an activation that is none", "", hidden_act="os.system"),
        config("an activation of a number", "", hidden_act=1),
        config("an epsilon of text", "", rms_norm_eps="x"),
        config("rope of text", "", rope_parameters="x"),
        config("rope of another kind", "", rope_parameters={"rope_type": "mine", "rope_theta": 1e4}),
        config("rope of 0", "", rope_parameters={"rope_type": "default", "rope_theta": 0}),
        config("rope of NaN", "NaN", rope_parameters={"rope_type": "default", "rope_theta": nan}),
        config("another architecture", "", model_type="gpt2")._replace(says="backbone"),
        config("no known architecture", "model_type", model_type="mine"),
        config("an architecture of a number", "model_type", model_type=7),
        config("an architecture of a list", "model_type", model_type=["llama"]),
        config("no decoder", "model_type", model_type="clip"),
        config("no attention", "model_type", model_type="mamba"),
        config("quantised", "quantization_config", quantization_config={"quant_method": "bitsandbytes"}),
        config("quantised by text", "quantization_config", quantization_config="x"),
        config("a method's name", "", get_text_config=3),
        config("layer types of text", "", layer_types="x"),
        Fault("config: no architecture", without(CONFIG, "model_type"), r"config\.json: model_type"),
        raw("empty", b""),
        raw("a list", b"[]"),
        raw("a string", b'"llama"'),
        raw("not UTF-8", b'{"model_type": "\xff"}'),
        raw("nested", b'{"a":' * DEEP + b"1" + b"}" * DEEP),
        Fault("config: too large", written(CONFIG, b" " * (2**20 + 1)), r"config\.json has more than"),
        Fault(
            "config: a key twice", inserted(CONFIG, '"vocab_size": 5'), r"config\.json: has the key 'vocab_size' twice"
        ),
        Fault(
            "config: nested in a field", inserted(CONFIG, f'"x": {"[" * DEEP}{"]" * DEEP}'), r"config\.json: is nested"
        ),
        Fault("config: missing", removed(CONFIG), r"config\.json cannot be read"),
        Fault("config: a pipe", piped(CONFIG), r"config\.json is no regular file"),
        Fault("config: a link out", linked(CONFIG), r"config\.json leads out"),
        Fault("config: a link to a device", linked(CONFIG, "/dev/zero"), r"config\.json leads out"),
        Fault("no backbone", lambda f: (f / "backbone").rename(f / "other"), r"config\.json cannot be read"),
    ]


def _of_index() -> list[Fault]:
    def one(what: str, change: Callable[[dict[str, Any]], object], says: str) -> Fault:
        return Fault(f"index: {what}", sharded(change), says)

    def to(file: object) -> Callable[[dict[str, Any]], object]:
        return lambda index: index["weight_map"].update({"norm.weight": file})

    return [
        one("no map", lambda index: index.pop("weight_map"), "weight_map"),
        one("an empty map", lambda index: index.update(weight_map={}), "weight_map"),
        one("a list", lambda index: index.update(weight_map=[]), "weight_map"),
        one("a file above", to("../../x/model.safetensors"), "weight_map names '../../x"),
        one("a file by its path", to("/etc/passwd"), "weight_map names '/etc/passwd'"),
        one("a number", to(5), "weight_map names '5'"),
        one("no safetensors", to("config.json"), "weight_map names 'config.json'"),
        one("a missing file", to("other.safetensors"), r"other\.safetensors"),
        one("a tensor that is not there", lambda i: i["weight_map"].update(x="model-00001-of-00001.safetensors"), "x"),
        one("a tensor less", lambda index: index["weight_map"].pop("norm.weight"), "norm.weight"),
        Fault("index: nested", in_turn(removed(WEIGHTS), written(INDEX, b"[" * DEEP)), "is nested"),
        Fault("index: a pipe", in_turn(removed(WEIGHTS), piped(INDEX)), "is no regular file"),
    ]


SEPARATE = [
    *_of_card(),
    *_of_config(),
    *_of_index(),
    *_of_tensors(HEAD, "hidden.weight"),
    *_of_tensors(WEIGHTS, "layers.0.self_attn.k_proj.weight"),
]


# -- native critics


def _of_native() -> list[Fault]:
    def filled(name: str, value: float) -> Callable[[Path], object]:
        return tensors(HEAD, lambda held: held[name].fill_(value))

    return [
        Fault("a V head", changed(CARD, head="V"), r"critic\.json: .*\"head\": \"Q\""),
        Fault("no made_for", without(CARD, "made_for"), r"critic\.json: .*made_for"),
        Fault("no mlp", without(CARD, "mlp"), r"critic\.json: .*mlp"),
        Fault("borrows", changed(CARD, borrow=["input_embeddings"]), r"critic\.json: .*borrow"),
        Fault("hidden", changed(CARD, hidden="first"), r"critic\.json: hidden"),
        Fault("made_for empty", changed(CARD, made_for={}), r"critic\.json: made_for"),
        Fault("made_for a name of a megabyte", changed(CARD, made_for={"model_type": "a" * 10**5}), "made_for"),
        Fault("scale 0", filled("token.scale", 0.0), r"head\.safetensors: token\.scale is not positive"),
        Fault("scale negative", filled("token.scale", -1.0), r"head\.safetensors: token\.scale is not positive"),
        Fault("least NaN", filled("log_ref.least", float("nan")), r"log_ref\.least' is not finite"),
        Fault("least infinite", filled("log_ref.least", float("inf")), r"log_ref\.least' is not finite"),
    ]


NATIVE = [
    *(fault for fault in _of_card() if "mlp of another" not in fault.name and "borrow" not in fault.name),
    *_of_native(),
    *_of_tensors(HEAD, "hidden.weight"),
]
