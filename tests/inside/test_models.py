"""Models: what is refused by its files, GGUF conversion once for all, the hub's errors, and whole folders."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from hpc.core.errors import HpcError, UsageError
from hpc.inside import models


def folder(path: Path, *names: str) -> str:
    path.mkdir(exist_ok=True)
    for name in names:
        (path / name).write_text("{}")
    return str(path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["config.json", "pytorch_model.bin"], "pickles"),
        (["config.json", "consolidated.00.pth"], "pickles"),
        (["config.json"], "no .safetensors file"),
        (["model.safetensors"], "no config.json"),
        (["params.json", "consolidated.00.pth"], "no config.json"),
    ],
)
def test_a_folder_that_cannot_work_is_refused(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        models.inspect(folder(tmp_path / "model", *names))
    assert caught.value.hint


@pytest.mark.parametrize("name", ["/none", "./none", "models/none.gguf"])
def test_a_path_without_a_model_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="there is no model at"):
        models.inspect(name)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()
    with pytest.raises(UsageError, match="is not a model"):
        models.inspect(str(tmp_path / "model.bin"))


def test_good_bases_pass(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    models.inspect(str(tmp_path / "model.gguf"))
    models.inspect("organisation/name")
    path = folder(tmp_path / "model", "config.json", "model.safetensors", "training_args.bin")
    assert models.local(path, tmp_path) == Path(path)


def test_the_last_complete_checkpoint_is_found(tmp_path: Path) -> None:
    assert models.checkpoints(tmp_path) == []
    for step, state in ((9, "{}"), (10, "{}"), (11, '{"half'), (12, None)):
        folder(tmp_path / f"checkpoint-{step}")
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert models.checkpoints(tmp_path)[0] == tmp_path / "checkpoint-10"


def test_a_folder_appears_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    folder(tmp_path / "model", "old")
    with models.written_whole(tmp_path / "model") as part:
        (part / "new").touch(mode=0o600)
        assert (tmp_path / "model" / "old").exists()
    assert [p.name for p in tmp_path.rglob("*")] == ["model", "new"]


def test_a_failed_write_leaves_the_old_folder(tmp_path: Path) -> None:
    folder(tmp_path / "model", "old")
    with pytest.raises(FileExistsError), models.written_whole(tmp_path / "model") as part:
        part.mkdir()  # it is there: any error of the block will do
    assert [p.name for p in tmp_path.rglob("*")] == ["model", "old"]


def test_what_a_killed_writer_left_goes_when_the_next_begins(tmp_path: Path) -> None:
    code = "import os, sys; from pathlib import Path; from hpc.inside import models"
    code += "\nwith models.written_whole(Path(sys.argv[1])) as part: (part / 'half').touch(); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code, tmp_path / "model"], check=False).returncode == -9
    assert [p.name for p in tmp_path.rglob("*")][1:] == ["half"]
    folder(tmp_path / ".model-of-another", "mine")
    with models.written_whole(tmp_path / "model") as part:
        (part / "new").touch()
    assert {p.name for p in tmp_path.iterdir()} == {"model", ".model-of-another"}


@pytest.mark.parametrize(
    ("umask", "readable", "file_mode", "folder_mode"),
    [(0o022, False, 0o644, 0o755), (0o077, False, 0o600, 0o700), (0o077, True, 0o644, 0o755)],
)
def test_modes_follow_the_umask_or_the_wish(
    tmp_path: Path, umask: int, readable: bool, file_mode: int, folder_mode: int
) -> None:
    before = os.umask(umask)
    try:
        with models.written_whole(tmp_path / "model", readable=readable) as part:
            (part / "weights").touch(mode=0o600)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == folder_mode
    assert stat.S_IMODE((tmp_path / "model" / "weights").stat().st_mode) == file_mode


def write_gguf(path: Path) -> None:
    """A random Llama of one layer in float32, as a GGUF file with a byte-level tokenizer."""
    import gguf
    import numpy as np
    from tokenizers.pre_tokenizers import ByteLevel

    width, words = 32, ["<s>", "</s>", *sorted(ByteLevel.alphabet()), "ab"]
    random = np.random.default_rng(0)

    def matrix(*shape: int) -> Any:
        return random.normal(0, 0.1, shape).astype(np.float32)

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(width)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3, 3] + [1] * (len(words) - 2))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    writer.add_tensor("token_embd.weight", matrix(len(words), width))
    writer.add_tensor("output_norm.weight", matrix(width))
    for name in ("attn_norm", "ffn_norm"):
        writer.add_tensor(f"blk.0.{name}.weight", matrix(width))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", matrix(width, width))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.train
def test_a_gguf_file_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    write_gguf(tmp_path / "tiny.gguf")
    made = models.local(str(tmp_path / "tiny.gguf"), tmp_path / "cache")
    model = models.load(made, "float32")
    assert model.config.use_cache
    assert model.get_input_embeddings().weight.dtype == torch.float32
    assert models.tokenizer(made).decode(models.tokenizer(made)("ab c")["input_ids"]).endswith("ab c")
    assert not list(made.glob("*.bin"))
    monkeypatch.setattr(models, "_dequantise", None)  # a second conversion would fail
    assert models.local(str(tmp_path / "tiny.gguf"), tmp_path / "cache") == made
    assert [p.name for p in made.parent.iterdir()] == [made.name]


@pytest.mark.train
def test_who_comes_second_waits_for_the_first_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    begun: list[Path] = []

    def convert(file: Path, target: Path) -> None:
        begun.append(target)
        time.sleep(0.5)
        (target / "config.json").touch()

    monkeypatch.setattr(models, "_dequantise", convert)
    with ThreadPoolExecutor(3) as pool:  # a lock belongs to who opened the file: threads wait as processes do
        made = set(pool.map(models.local, [str(tmp_path / "tiny.gguf")] * 3, [tmp_path / "cache"] * 3))
    assert (len(made), len(begun)) == (1, 1)


def _no_locks(*_: object) -> None:
    raise OSError("Function not implemented")


@pytest.mark.train
def test_two_may_convert_at_once_where_a_file_system_has_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models.fcntl, "flock", _no_locks)
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    done: list[Path] = []

    def convert(file: Path, target: Path) -> None:
        (target / "config.json").touch()
        if not done:
            done.append(target)
            done.append(models.local(str(file), tmp_path / "cache"))  # the other one, from start to end

    monkeypatch.setattr(models, "_dequantise", convert)
    made = models.local(str(tmp_path / "tiny.gguf"), tmp_path / "cache")
    assert made == done[1]
    assert [p.name for p in made.parent.iterdir()] == [made.name]


@pytest.mark.train
def test_a_broken_gguf_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(HpcError, match="cannot read"):
        models.local(str(tmp_path / "tiny.gguf"), tmp_path / "cache")
    assert not list((tmp_path / "cache" / "models").iterdir())


@pytest.mark.train
def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    with pytest.raises(HpcError, match="no chat template"):
        models.tokenizer(tmp_path)
    assert models.tokenizer(tmp_path, "{{ messages }}").chat_template == "{{ messages }}"


@pytest.mark.train
@pytest.mark.parametrize(
    ("error", "message", "hint"),
    [
        ("GatedRepoError", "is gated", "HF_TOKEN"),
        ("RepositoryNotFoundError", "the hub has no model 'org/name'", "check the name"),
        ("LocalEntryNotFoundError", "cannot get 'org/name' from the hub", "login node"),
        ("OfflineModeIsEnabled", "HF_HUB_OFFLINE is set", "login node"),
    ],
)
def test_the_hubs_errors_are_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str, message: str, hint: str
) -> None:
    import huggingface_hub

    kind: Any = getattr(huggingface_hub.errors, error)

    def download(*_: object, **__: object) -> str:
        raise kind.__new__(kind)

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    if error == "OfflineModeIsEnabled":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(HpcError) as caught:
        models.local("org/name", tmp_path)
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert "hf_secret" not in caught.value.message + caught.value.hint
