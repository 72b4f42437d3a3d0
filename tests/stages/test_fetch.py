"""fetch: from a real server that speaks the hub's API, from paths and URLs, into checked safetensors; its refusals."""

from __future__ import annotations

import base64
import errno
import hashlib
import io
import json
import os
import random
import shutil
import struct
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from hpc.core.errors import UsageError, VerificationFailed
from hpc.inside import tiktokens, weights
from stages import fetch

from ..support.hub import COMMIT, Hub, serving

RunStage = Callable[..., Any]
MODEL = "models/org/tiny"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serving() as found:
        monkeypatch.setenv("HF_ENDPOINT", found.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hub-home"))
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        yield found


@pytest.fixture
def tiny(hub: Hub, tiny_model: Path) -> dict[str, bytes]:
    """The tiny model as a repository on the hub."""
    files = {path.name: path.read_bytes() for path in tiny_model.iterdir()}
    hub.repos[MODEL] = {**files, "README.md": b"#", "original/params.json": b"{}", "pytorch_model.bin": b"pickle"}
    return files


# ---- what is refused before the queue


@pytest.mark.parametrize(
    "config",
    [
        {"model": "gpt2"},
        {"model": "https://a b"},
        {"datasets": ("https://a.org/x#sha256=12",)},
        {"datasets": ("x",)},
        {"datasets": ("a/faq", "b/faq@v2")},
    ],
)
def test_check_refuses_what_can_be_no_source(config: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        fetch.check(fetch.FetchConfig(**config))


def test_it_makes_what_is_asked_for_and_is_left_out_where_nothing_is() -> None:
    both = fetch.FetchConfig(model="org/name", datasets=("org/data", "https://a.org/x.jsonl"))
    fetch.check(both)
    assert {name: a.kind for name, a in fetch.outputs(both).items()} == {"model": "hf_model", "data": "records"}
    assert fetch.unneeded(fetch.FetchConfig())
    assert not fetch.unneeded(both)


# ---- the hub


@pytest.mark.train
def test_a_model_is_fetched_whole_once_and_without_what_is_not_wanted(
    hub: Hub, tiny: dict[str, bytes], run_stage: RunStage
) -> None:
    hub.cut["model.safetensors"] = 50_000
    result = run_stage("fetch", {"model": "org/tiny"}, model="org/tiny")
    assert result.code == 0, result.error
    assert {path.name: path.read_bytes() for path in result.out("model").iterdir()} == tiny
    assert hub.ranges("model.safetensors") == ["", "bytes=50000-"]
    assert result.metrics["model"]["commit"] == COMMIT
    assert any("org/tiny: " in event.get("message", "") for event in result.events)
    asked = len(hub.asked)
    again = run_stage("fetch", {"model": "org/tiny"}, folder="again", model="org/tiny")
    assert again.code == 0
    assert [path for path, _ in hub.asked[asked:]] == ["/api/models/org/tiny"], "the files are there"
    assert (again.out("model") / "model.safetensors").stat().st_ino == (
        result.out("model") / "model.safetensors"
    ).stat().st_ino


@pytest.mark.train
def test_a_gated_model_is_explained_and_opens_with_the_token(
    hub: Hub, tiny: dict[str, bytes], run_stage: RunStage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.gated[MODEL] = "hf_right"
    nothing = run_stage("fetch", model="org/tiny")
    assert nothing.error["cause"] == "'org/tiny' is gated, and no token was given"
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    wrong = run_stage("fetch", folder="wrong", model="org/tiny")
    assert wrong.error["cause"] == "'org/tiny' is gated, and your token may not read it"
    assert "accept its licence" in wrong.error["hint"]
    monkeypatch.delenv("HF_TOKEN")
    home = tmp_path / "home"
    home.mkdir()
    (home / "token").write_text("hf_right\n")
    (home / "token").chmod(0o644)
    open_to_all = run_stage("fetch", folder="open", model="org/tiny", hub_home=str(home))
    assert (open_to_all.code, open_to_all.error["hint"]) == (2, f"chmod 600 {home / 'token'}")
    (home / "token").chmod(0o600)
    right = run_stage("fetch", folder="right", model="org/tiny", hub_home=str(home))
    assert right.code == 0
    everything = "".join(
        p.read_text(errors="replace") for p in right.folder.rglob("*") if p.suffix in (".json", ".jsonl")
    )
    assert "hf_right" not in everything


@pytest.mark.train
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_that_was_changed_on_the_way_is_refused(
    hub: Hub, tiny: dict[str, bytes], run_stage: RunStage, name: str
) -> None:
    hub.wrong.add(name)
    result = run_stage("fetch", model="org/tiny")
    assert result.code == 6
    assert f"{name} is not the file that it should be" in result.error["cause"]
    assert not result.out("model").exists()


@pytest.mark.train
def test_a_model_that_is_not_there_and_a_hub_that_is_not(
    hub: Hub, run_stage: RunStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "the hub has no model 'org/none'" in run_stage("fetch", model="org/none").error["cause"]
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    away = run_stage("fetch", folder="away", model="org/tiny").error
    assert "cannot get 'org/tiny' from the hub" in away["cause"]
    assert 'network = "login"' in away["hint"]


@pytest.mark.train
def test_offline_what_was_fetched_before_is_there_and_the_rest_is_explained(
    hub: Hub, tiny: dict[str, bytes], run_stage: RunStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_stage("fetch", model="org/tiny").code == 0
    asked = len(hub.asked)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run_stage("fetch", folder="again", model="org/tiny").code == 0
    other = run_stage("fetch", folder="other", model="org/other")
    assert other.error["cause"].startswith("HF_HUB_OFFLINE is set, and 'org/other' is neither in the cache")
    assert len(hub.asked) == asked


@pytest.mark.train
def test_the_hubs_own_cache_is_used_offline_and_its_broken_files_are_not(
    hub: Hub, tiny: dict[str, bytes], run_stage: RunStage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    repo = tmp_path / "own" / "models--org--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    (repo / "blobs").mkdir()
    (repo / "snapshots" / COMMIT).mkdir(parents=True)
    for name, data in tiny.items():
        blob = repo / "blobs" / hashlib.sha256(data).hexdigest()
        blob.write_bytes(data)
        (repo / "snapshots" / COMMIT / name).symlink_to(blob)
    found = run_stage("fetch", model="org/tiny")
    assert found.code == 0, found.error
    assert (found.out("model") / "config.json").read_bytes() == tiny["config.json"]
    shutil.rmtree(tmp_path / "cache" / "fetch")
    (repo / "snapshots" / COMMIT / "config.json").resolve().write_bytes(b"{}")
    assert run_stage("fetch", folder="broken", model="org/tiny").code == 6


@pytest.mark.train
def test_data_sets_come_from_the_hub_and_from_a_url_and_prepare_reads_them(
    hub: Hub, tiny: dict[str, bytes], run_stage: RunStage
) -> None:
    rows = [json.dumps({"instruction": f"Question {i}?", "output": f"Answer {i}."}) + "\n" for i in range(8)]
    hub.repos["datasets/org/faq"] = {"train.jsonl": "".join(rows[:5]).encode(), "logo.png": b"png"}
    hub.files["more.jsonl"] = more = "".join(rows[5:]).encode()
    digest = hashlib.sha256(more).hexdigest()
    got = run_stage("fetch", model="org/tiny", datasets=("org/faq", f"{hub.url}/more.jsonl#sha256={digest}"))
    assert got.code == 0, got.error
    assert sorted(str(p.relative_to(got.out("data"))) for p in got.out("data").rglob("*.*")) == [
        "faq/train.jsonl",
        "more.jsonl",
    ]
    inputs = {"records": got.out("data"), "tokenizer": got.out("model")}
    made = run_stage("prepare", inputs, data=("fetch:faq/*.jsonl",), eval_data=("fetch:more.jsonl",))
    assert (made.metrics["train"], made.metrics["eval"]) == (5, 3), made.error
    assert made.metrics["tokens"]["longest"] > 10
    everything = run_stage("prepare", inputs, folder="all")
    assert everything.metrics["train"] == 8
    for text in (b"one\n", b"another\n"):  # it changed at its address
        hub.files["plain.txt"] = text
        told = run_stage("fetch", folder=text.decode().strip(), datasets=(f"{hub.url}/plain.txt",))
        assert (told.out("data") / "plain.txt").read_bytes() == text
    wrong = run_stage("fetch", folder="wrong", datasets=(f"{hub.url}/more.jsonl#sha256={'0' * 64}",))
    assert wrong.code == 6


@pytest.mark.train
def test_a_stop_keeps_the_parts(
    hub: Hub, tiny: dict[str, bytes], run_stage: RunStage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from hpc.inside import runner

    monkeypatch.setattr(runner.RunContext, "stopping", lambda self: True)
    result = run_stage("fetch", model="org/tiny")
    assert (result.code, result.out("model").exists()) == (85, False)


# ---- pickles, Meta's form, archives, paths


@pytest.fixture
def pickled(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model with its weights as a pickle."""
    import torch
    from safetensors.torch import load_file

    folder = tmp_path / "pickled"
    shutil.copytree(tiny_model, folder)
    (folder / "model.safetensors").unlink()
    torch.save(load_file(tiny_model / "model.safetensors"), folder / "pytorch_model.bin")
    return folder


@pytest.mark.train
def test_pickles_are_refused_unless_they_are_named(pickled: Path, tiny_model: Path, run_stage: RunStage) -> None:
    (pickled / "training_args.bin").write_bytes(b"what a trainer leaves there: code")
    refused = run_stage("fetch", model=str(pickled))
    assert "holds its weights as pickles" in refused.error["cause"]
    assert 'fetch.pickles = ["pytorch_model.bin"]' in refused.error["hint"]
    named = run_stage("fetch", folder="named", model=str(pickled), pickles=("pytorch_model.bin",))
    assert named.code == 0, named.error
    assert same_weights(named.out("model"), tiny_model)
    assert not (named.out("model") / "training_args.bin").exists()


class _Harm:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("harm",)


@pytest.mark.train
def test_a_pickle_with_code_in_it_runs_nothing(
    pickled: Path, run_stage: RunStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    torch.save({"x": _Harm()}, pickled / "pytorch_model.bin")
    result = run_stage("fetch", model=str(pickled), pickles=("pytorch_model.bin",))
    assert result.code == 6
    assert "\x1b" not in result.error["cause"]
    assert not (tmp_path / "harm").exists()


def test_a_shard_that_lacks_is_named(tmp_path: Path) -> None:
    """Also where no index says which there must be."""
    header = json.dumps({"x": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    for number in (1, 3):
        shard = tmp_path / f"model-{number:05}-of-00003.safetensors"
        shard.write_bytes(struct.pack("<Q", len(header)) + header + b"x")
    with pytest.raises(VerificationFailed, match=r"lacks model-00002-of-00003\.safetensors"):
        weights.check(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").write_bytes(shard.read_bytes())
    assert weights.check(tmp_path) == 3 * shard.stat().st_size


def same_weights(one: Path, other: Path) -> bool:
    import torch
    from safetensors.torch import load_file

    a, b = ({k: v for f in sorted(p.glob("*.safetensors")) for k, v in load_file(f).items()} for p in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="session")
def meta(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a LLaMA as Meta gives it: two shards, a list of md5, a SentencePiece tokenizer; the same for transformers)."""
    import sentencepiece

    folder, ours = tmp_path_factory.mktemp("meta"), tmp_path_factory.mktemp("ours")
    text = "\n".join(f"the quick brown fox number {i} jumps over the lazy dog {i * 7}" for i in range(300))
    with open(folder / "tokenizer.model", "wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text.splitlines()), model_writer=model, vocab_size=400, model_type="bpe",
            byte_fallback=True, minloglevel=2,
        )  # fmt: skip
    meta_model(folder, ours, 400)
    return folder, ours


def meta_model(folder: Path, ours: Path, vocabulary: int, **more: Any) -> None:
    """A small LLaMA in both forms."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=vocabulary, num_key_value_heads=2, rms_norm_eps=1e-5, **shape)
    model_ = LlamaForCausalLM(config)
    model_.save_pretrained(ours)
    state = model_.state_dict()
    params = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5, "vocab_size": -1, **more}
    (folder / "params.json").write_text(json.dumps(params))

    def paired(tensor: Any, heads: int) -> Any:
        rows, columns = tensor.shape
        return tensor.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)

    shards: list[dict[str, Any]] = [{}, {}]

    def give(name: str, tensor: Any, along: int | None) -> None:
        parts = [tensor, tensor] if along is None else tensor.chunk(2, dim=along)
        for shard, part in zip(shards, parts, strict=True):
            shard[f"{name}.weight"] = part.clone()

    give("tok_embeddings", state["model.embed_tokens.weight"], 1)
    give("norm", state["model.norm.weight"], None)
    give("output", state["lm_head.weight"], 0)
    for layer in range(2):
        here = f"model.layers.{layer}."
        give(f"layers.{layer}.attention.wq", paired(state[here + "self_attn.q_proj.weight"], 4), 0)
        give(f"layers.{layer}.attention.wk", paired(state[here + "self_attn.k_proj.weight"], 2), 0)
        give(f"layers.{layer}.attention.wv", state[here + "self_attn.v_proj.weight"], 0)
        give(f"layers.{layer}.attention.wo", state[here + "self_attn.o_proj.weight"], 1)
        give(f"layers.{layer}.feed_forward.w1", state[here + "mlp.gate_proj.weight"], 0)
        give(f"layers.{layer}.feed_forward.w2", state[here + "mlp.down_proj.weight"], 1)
        give(f"layers.{layer}.feed_forward.w3", state[here + "mlp.up_proj.weight"], 0)
        give(f"layers.{layer}.attention_norm", state[here + "input_layernorm.weight"], None)
        give(f"layers.{layer}.ffn_norm", state[here + "post_attention_layernorm.weight"], None)
    for number, shard in enumerate(shards):
        torch.save(shard, folder / f"consolidated.0{number}.pth")
    names = ("consolidated.00.pth", "consolidated.01.pth", "params.json")
    lines = (f"{hashlib.md5((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names)
    (folder / "checklist.chk").write_text("".join(lines))


@pytest.mark.train
def test_metas_shards_become_the_same_model_for_transformers(meta: tuple[Path, Path], run_stage: RunStage) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, ours = meta
    result = run_stage("fetch", model=str(folder), family="llama-2")
    assert result.code == 0, result.error
    made = result.out("model")
    assert same_weights(made, ours)
    model = AutoModelForCausalLM.from_pretrained(made)
    assert (model.config.num_key_value_heads, model.config.rms_norm_eps) == (2, 1e-5)
    import sentencepiece

    tokenizer = AutoTokenizer.from_pretrained(made)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    text = "the quick brown fox jumps"
    assert tokenizer(text)["input_ids"] == [1, *reference.encode(text)], "one BOS, and Meta's own tokens"
    asked = [{"role": "user", "content": text}]
    assert tokenizer.apply_chat_template(asked, return_dict=True)["input_ids"].count(1) == 1


def ranked(texts: Iterable[str], merges: int) -> dict[bytes, int]:
    """Token -> rank: all bytes, and the most frequent pairs of these texts, one after the other."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    words = [[bytes([byte]) for byte in piece.encode()] for text in texts for piece in pieces(text)]
    for _ in range(merges):
        pairs = Counter(pair for word in words for pair in pairwise(word))
        (left, right), _ = pairs.most_common(1)[0]
        ranks[left + right] = len(ranks)
        words = [merged(word, left, right) for word in words]
    return ranks


def pieces(text: str) -> list[str]:
    import regex

    return list(regex.findall(tiktokens.PATTERN, text))


def merged(word: list[bytes], left: bytes, right: bytes) -> list[bytes]:
    made: list[bytes] = []
    for token in word:
        if made and made[-1] == left and token == right:
            made[-1] = left + right
        else:
            made.append(token)
    return made


def encoded(text: str, ranks: dict[bytes, int], special: dict[str, int]) -> list[int]:
    """BPE by ranks as tiktoken does it: the pair of the lowest rank first, from the left."""
    import regex

    found: list[int] = []
    for part in regex.split("(" + "|".join(map(regex.escape, special)) + ")", text):
        if part in special:
            found.append(special[part])
            continue
        for piece in pieces(part):
            if piece.encode() in ranks:
                found.append(ranks[piece.encode()])
                continue
            word = [bytes([byte]) for byte in piece.encode()]
            while len(word) > 1:
                best = min(range(len(word) - 1), key=lambda at: ranks.get(word[at] + word[at + 1], 1 << 30))
                if word[best] + word[best + 1] not in ranks:
                    break
                word[best : best + 2] = [word[best] + word[best + 1]]
            found += [ranks[token] for token in word]
    return found


SAID = (
    "The quick brown fox's 12345 tokens, didn't it?\n\n  Indented:\tyes   \r\n",
    "안녕하세요, 반갑습니다! 세계 여러분 🙂",
    "naïve café — 日本語 🏳️\u200d🌈👩\u200d💻 \u200b e\u0301", " leading and trailing ", "aaaaaaaaaa", "\n", "",
    "<|start_header_id|>user<|end_header_id|>\n\n안녕 <|eot_id|>", "<|begin_of_tex|> is no token, <|eot_id|>is",
)  # fmt: skip


@pytest.mark.train
@pytest.mark.generations
@pytest.mark.parametrize(("scaled", "name"), [(False, "Meta-Llama-3-8B"), (True, "Llama3.1-8B-Instruct")])
def test_the_tokenizer_of_llama_3(run_stage: RunStage, tmp_path: Path, scaled: bool, name: str) -> None:
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    folder, ranks = tmp_path / name, ranked([*SAID, *SAID[:3]], 120)
    folder.mkdir()
    meta_model(folder, tmp_path / "ours", len(ranks) + 256, **({"use_scaled_rope": True} if scaled else {}))
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    (folder / "tokenizer.model").write_text("".join(lines))
    result = run_stage("fetch", model=str(folder))
    assert result.code == 0, result.error
    made, first = result.out("model"), len(ranks)
    tokenizer = AutoTokenizer.from_pretrained(made)
    special = {word: first + number for number, word in enumerate(tiktokens.special(scaled))}
    assert len(special) == len(tokenizer) - first == 256
    assert special["<|eot_id|>"] == first + 9
    alphabet = "aab bc 1\n안🙂é'"
    noise = ["".join(random.Random(seed).choices(alphabet, k=40)) for seed in range(200)]
    for text in (*SAID, *noise):
        right = encoded(text, ranks, special)
        assert tokenizer(text)["input_ids"] == [first, *right], text
        assert tokenizer.encode(text, add_special_tokens=False) == right
        assert tokenizer.decode(right) == text
    chat = [{"role": "user", "content": "안녕"}]
    ends = GenerationConfig.from_pretrained(made).eos_token_id
    config = AutoConfig.from_pretrained(made)
    assert config.bos_token_id == first
    assert json.loads((made / "config.json").read_text()).get("rope_scaling", {}).get("factor") == (
        32 if scaled else None
    ), "so narrow a model is of 3.2"
    if scaled:  # the name says Instruct
        asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert (asked.count(first), asked.count(first + 9)) == (1, 1)
        assert (tokenizer.eos_token, ends) == ("<|eot_id|>", [first + 1, first + 8, first + 9])
    else:
        assert not tokenizer.chat_template
        assert (tokenizer.eos_token, ends) == ("<|end_of_text|>", first + 1)
        result = run_stage("fetch", model=str(folder), family="llama-3")
        asked = AutoTokenizer.from_pretrained(result.out("model")).apply_chat_template(chat, return_dict=True)
        assert asked["input_ids"].count(first) == 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda lines: [*lines[:-2], lines[-1]], "ranks or single bytes are missing"),
        (lambda lines: lines[1:], "ranks or single bytes are missing"),
        (lambda lines: [*lines, "!!! 300"], "damaged at line 301"),
        (lambda lines: [*lines, "YQ=="], "damaged at line 301"),
    ],
)
def test_a_damaged_tokenizer_of_llama_3_is_told(tmp_path: Path, change: Any, told: str) -> None:
    tokens = [*(bytes([byte]) for byte in range(256)), *(b"a" * (2 + more) for more in range(44))]
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
    path = tmp_path / "tokenizer.model"
    path.write_text("\n".join(lines) + "\n")
    assert tiktokens.is_form(path)
    assert len(tiktokens.read(path)) == 300
    path.write_text("\n".join(change(lines)) + "\n")
    with pytest.raises(VerificationFailed, match=told):
        tiktokens.read(path)
    path.write_bytes(b"\n\x0e\n\x05<unk>\x15\x00")
    assert not tiktokens.is_form(path)


@pytest.mark.train
def test_metas_list_is_checked(meta: tuple[Path, Path], run_stage: RunStage, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(meta[0], folder)
    data = bytearray((folder / "consolidated.01.pth").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "consolidated.01.pth").write_bytes(data)
    broken = run_stage("fetch", model=str(folder))
    assert (broken.code, "its md5 differs" in broken.error["cause"]) == (6, True)
    (folder / "checklist.chk").unlink()
    unlisted = run_stage("fetch", folder="unlisted", model=str(folder))
    assert "which has no checklist.chk, holds its weights as pickles" in unlisted.error["cause"]


@pytest.mark.train
def test_an_archive_and_a_path_give_a_model_and_a_cut_off_one_is_refused(
    hub: Hub, tiny_model: Path, run_stage: RunStage, tmp_path: Path
) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        tar.add(tiny_model, "some/where")
    hub.files["tiny.tar.gz"] = packed.getvalue()
    result = run_stage("fetch", model=f"{hub.url}/tiny.tar.gz")
    assert result.code == 0, result.error
    assert same_weights(result.out("model"), tiny_model)
    cut = tmp_path / "cut"
    shutil.copytree(tiny_model, cut)
    os.truncate(cut / "model.safetensors", 1000)
    assert run_stage("fetch", folder="cut", model=str(cut)).code == 6
    hub.tags = "none"
    for name in ("page.gguf", "page.tar"):
        hub.files[name] = b"<html>down</html>"
        assert [run_stage("fetch", folder=f"{name}{i}", model=f"{hub.url}/{name}").code for i in (1, 2)] == [6, 6]
        assert len(hub.ranges(name)) == 2, "an error page is not kept"
    hub.files["x.gguf"] = b"GGUF nothing"
    assert "cannot read" in run_stage("fetch", folder="gguf", model=f"{hub.url}/x.gguf").error["cause"]
    assert run_stage("fetch", folder="zip", model=f"{hub.url}/x.zip").code == 2


@pytest.mark.train
def test_a_folder_of_the_users_may_be_written_to_afterwards(
    tiny_model: Path, run_stage: RunStage, tmp_path: Path, pickled: Path
) -> None:
    from safetensors.torch import load_file, save_file

    model = tmp_path / "mine"
    shutil.copytree(tiny_model, model)
    made = run_stage("fetch", model=str(model))
    converted = run_stage("fetch", folder="converted", model=str(pickled), pickles=("pytorch_model.bin",))
    assert (made.code, converted.code) == (0, 0), (made.error, converted.error)
    changed = {name: tensor + 1 for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(changed, model / "model.safetensors", {"format": "pt"})
    for folder in (model, pickled):
        (folder / "config.json").write_text("{}")
    assert same_weights(made.out("model"), tiny_model)
    for result in (made, converted):
        assert (result.out("model") / "config.json").read_bytes() == (tiny_model / "config.json").read_bytes()


@pytest.mark.parametrize("fails", [0, errno.EXDEV, errno.ENOSYS], ids=["shared", "other disk", "old kernel"])
def test_data_of_the_users_is_copied_whole_and_in_pieces(
    run_stage: RunStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: int
) -> None:
    from hpc.inside import fetching, models

    def failing(*words: object) -> int:
        raise OSError(fails, os.strerror(fails))

    monkeypatch.setattr(models, "settle", lambda: None)  # else the other tests get its environment
    monkeypatch.setattr(fetching, "_PIECE", 1000)
    if fails:
        monkeypatch.setattr(os, "copy_file_range", failing)
    given = tmp_path / "data" / "faq.jsonl"
    given.parent.mkdir()
    given.write_bytes(text := os.urandom(4500))
    (tmp_path / "data" / "empty.jsonl").touch()
    result = run_stage("fetch", datasets=(str(given), f"{given.parent}"))
    assert result.code == 0, result.error
    with open(given, "r+b") as file:
        file.write(b"changed in place")
    for name in ("faq.jsonl", "data/faq.jsonl"):
        assert (result.out("data") / name).read_bytes() == text
    assert (result.out("data") / "data" / "empty.jsonl").read_bytes() == b""


def test_a_copy_that_is_asked_to_stop_leaves_nothing(
    run_stage: RunStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hpc.inside import models, runner

    monkeypatch.setattr(models, "settle", lambda: None)
    monkeypatch.setattr(runner.RunContext, "stopping", lambda self: True)
    (tmp_path / "faq.jsonl").write_text("{}\n")
    result = run_stage("fetch", datasets=(str(tmp_path / "faq.jsonl"),))
    assert (result.code, list((result.folder / "out").iterdir())) == (85, [])
