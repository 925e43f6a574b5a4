"""Other runtimes load a bundle unchanged: their files say what ours say, and they find our tokens."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
import transformers
from sentencepiece import sentencepiece_model_pb2 as proto

from edge_demo.bundle.reader import Bundle
from edge_demo.engine.runner import Engine
from edge_demo.text.tokenizer import Tokenizer
from export.bundle.ecosystem import write_ecosystem_files
from gemma_keras import open_checkpoint
from gemma_keras.checkpoints.hf.config import config_from_hf
from gemma_keras.checkpoints.hf.tokenizer_json import tokenizer_json
from gemma_keras.config import GemmaConfig
from gemma_keras.errors import CheckpointError
from tests.conftest import ROOT
from tests.gemma_keras.test_tokenizer import LONGEST_RUN, STRINGS
from tests.models import CHATML_JINJA, GENERATIONS, tiny_tokenizer_model

TYPES = {"gemma": "gemma", "gemma2": "gemma2", "gemma3": "gemma3_text"}
CONTROL = re.compile(r"<(pad|eos|bos|unk|mask|start_of_turn|end_of_turn|unused\d+)>")


def read(path):
    return json.loads(path.read_bytes())


# --- the small files -----------------------------------------------------------------------------


@pytest.mark.parametrize("generation", GENERATIONS)
def test_config_json_describes_the_bundles_model(tiny_bundles, generation):
    folder = tiny_bundles / f"{generation}-int8"
    config = read(folder / "config.json")
    described = config_from_hf(config)
    assert described == GemmaConfig.from_dict(read(folder / "bundle.json")["model"]["config"])
    assert config["model_type"] == TYPES[generation]
    theirs = transformers.AutoConfig.from_pretrained(folder)
    assert type(theirs).__name__ in ("GemmaConfig", "Gemma2Config", "Gemma3TextConfig")
    assert config_from_hf(theirs.to_dict()) == described
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (2, 1, 0)
    generation_config = transformers.GenerationConfig.from_pretrained(folder)
    assert (generation_config.eos_token_id, generation_config.do_sample) == (1, False)


def test_a_shorter_context_is_told_everywhere(tiny_bundles):
    short = tiny_bundles / "short"
    assert read(short / "config.json")["max_position_embeddings"] == 16
    assert read(short / "tokenizer_config.json")["model_max_length"] == 16
    genai = read(short / "genai_config.json")
    assert genai["model"]["context_length"] == genai["search"]["max_length"] == 16


@pytest.mark.parametrize("generation", GENERATIONS)
def test_genai_config_names_what_the_graph_has(tiny_bundles, generation):
    folder = tiny_bundles / f"{generation}-fp32"
    manifest = read(folder / "bundle.json")
    model = read(folder / "genai_config.json")["model"]
    decoder = model["decoder"]
    graph = manifest["graphs"]["interchange"]
    assert decoder["filename"] == graph["file"]
    for side in ("inputs", "outputs"):
        patterns = decoder[side].values()
        layers = range(decoder["num_hidden_layers"])
        named = {n for p in patterns for n in ([p % i for i in layers] if "%d" in p else [p])}
        assert named == {tensor["name"] for tensor in graph[side]}
    past = next(t for t in graph["inputs"] if t["name"] == "past_key_values.0.key")
    heads, size = decoder["num_key_value_heads"], decoder["head_size"]
    # transformers.js makes an empty past by the name of the first dimension
    assert past["shape"] == ["batch_size", heads, "past_sequence_length", size]
    assert model["vocab_size"] == manifest["model"]["vocabulary_size"]
    assert model["type"] == TYPES[generation]


def test_the_files_are_listed_with_the_weights_once(tiny_bundles):
    bundle = Bundle.open(tiny_bundles / "gemma3-int8")
    for name in ("config.json", "generation_config.json", "genai_config.json", "tokenizer.json",
                 "tokenizer_config.json", "README.md"):  # fmt: skip
        assert name in bundle.files
    assert sum(name.endswith("_data") for name in bundle.files) == 1
    bundle.verify(use_memory=False)


def test_a_model_that_has_no_such_form_is_a_bundle_without_them(tiny_bundles, tmp_path):
    checkpoint = open_checkpoint(tiny_bundles / "tiny-gemma3")
    entry = {"bos": 2, "stop": [1]}
    assert write_ecosystem_files(tmp_path, checkpoint, entry, 128)
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    layers = checkpoint.config.layers
    uneven = dataclasses.replace(
        checkpoint.config, layers=(dataclasses.replace(layers[0], ffw_dim=64), *layers[1:])
    )
    unigram = proto.ModelProto.FromString(tiny_tokenizer_model())
    unigram.trainer_spec.model_type = unigram.trainer_spec.UNIGRAM
    for change in ({"config": uneven}, {"tokenizer_model": unigram.SerializeToString()}):
        assert not write_ecosystem_files(
            tmp_path, dataclasses.replace(checkpoint, **change), entry, 128
        )
        assert not list(tmp_path.iterdir())


# --- the tokenizer -------------------------------------------------------------------------------


def test_a_small_tokenizer_gives_the_same_ids(tiny_bundles):
    ours = Tokenizer(Bundle.open(tiny_bundles / "gemma3-fp32"))
    theirs = transformers.AutoTokenizer.from_pretrained(tiny_bundles / "gemma3-fp32")
    assert type(theirs).__name__ == "GemmaTokenizer"
    for group in STRINGS.values():
        for text in group[::20]:
            if not CONTROL.search(text):
                assert theirs(text)["input_ids"] == ours.encode(text)


def test_chatml_is_the_models_own_and_gives_our_ids(tiny_bundles):
    ours = Tokenizer(Bundle.open(tiny_bundles / "chatml"))
    theirs = transformers.AutoTokenizer.from_pretrained(tiny_bundles / "chatml")
    assert theirs.chat_template == CHATML_JINJA
    talk = [
        {"role": "system", "content": "Be brief. "},
        {"role": "user", "content": " The boat?"},
        {"role": "assistant", "content": "It went down."},
        {"role": "user", "content": "And  then?\n"},
    ]
    turns = [({"assistant": "model"}.get(m["role"], "user"), m["content"]) for m in talk[1:]]
    found = theirs.apply_chat_template(talk, add_generation_prompt=True)["input_ids"]
    assert found == ours.encode_chat(turns, "Be brief. ")
    stops = read(tiny_bundles / "chatml" / "generation_config.json")["eos_token_id"]
    assert stops == read(tiny_bundles / "chatml" / "genai_config.json")["model"]["eos_token_id"]
    assert stops == list(ours.spec.stop) == [1, theirs.convert_tokens_to_ids("<|im_end|>")]


def test_the_chat_template_is_ours(tiny_bundles):
    ours = Tokenizer(Bundle.open(tiny_bundles / "chat"))
    theirs = transformers.AutoTokenizer.from_pretrained(tiny_bundles / "chat")
    turns = [("user", " The boat?\n"), ("model", "It went down."), ("user", "And  then?")]
    messages = [
        {"role": {"model": "assistant"}.get(who, who), "content": text} for who, text in turns
    ]
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    found = theirs(text, add_special_tokens=False)["input_ids"]
    assert found == ours.encode_chat(turns)
    system = {"role": "system", "content": "Be brief. "}
    with_system = theirs.apply_chat_template([system, *messages[:1]], tokenize=False)
    assert with_system == "<bos><start_of_turn>user\nBe brief.\n\nThe boat?<end_of_turn>\n"
    stops = read(tiny_bundles / "chat" / "generation_config.json")["eos_token_id"]
    assert stops == list(ours.spec.stop)
    assert transformers.GenerationConfig.from_pretrained(tiny_bundles / "chat").top_k == 64
    assert theirs.decode(ours.spec.stop[1]) == "<end_of_turn>"


@pytest.mark.parametrize("change", ["add_dummy_prefix", "remove_extra_whitespaces"])
def test_a_tokenizer_that_changes_text_is_refused(change):
    model = proto.ModelProto.FromString(tiny_tokenizer_model())
    setattr(model.normalizer_spec, change, True)
    with pytest.raises(CheckpointError, match="normalizes text"):
        tokenizer_json(model.SerializeToString())


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(json.dumps(tokenizer_json(open_checkpoint("sample").tokenizer_model)))
    return tokenizers.Tokenizer.from_file(str(path))


@pytest.fixture(scope="module")
def ours(sample_bundle):
    return Tokenizer(Bundle.open(sample_bundle))


@pytest.mark.sample
@pytest.mark.parametrize("kind", STRINGS)
def test_gemmas_tokenizer_gives_the_same_ids_and_the_text_back(kind, ours, tokenizer_file):
    texts = [text for text in STRINGS[kind] if not CONTROL.search(text)]
    assert texts
    different = {t: ours.encode(t) for t in texts if ours.encode(t) != tokenizer_file.encode(t).ids}
    assert different == {}
    for text in texts:
        assert tokenizer_file.decode(ours.encode(text)) == ours.decode(ours.encode(text))


@pytest.mark.sample
@pytest.mark.parametrize("length", [LONGEST_RUN, LONGEST_RUN + 1, 2 * LONGEST_RUN + 5, 200])
def test_long_runs_of_spaces_are_cut_as_sentencepiece_cuts_them(length, ours, tokenizer_file):
    """transformers' own conversion of the same vocabulary does not."""
    for text in (" " * length, f"a{' ' * length}b", "\n" * length, "\t" * length):
        assert tokenizer_file.encode(text).ids == ours.encode(text)


@pytest.mark.sample
def test_control_tokens_in_text_are_found_as_that_ecosystem_expects(ours, tokenizer_file):
    """The one difference; `edge_demo` takes them for text."""
    text = "<start_of_turn>user"
    assert tokenizer_file.encode(text).ids == [2, 105, 2364]
    assert ours.encode(text)[:3] == [2, 236820, 3041]


# --- onnxruntime-genai ---------------------------------------------------------------------------

GENAI = """
import json, sys
import numpy as np
import onnxruntime_genai as og

folder, prompts, count, texts = json.loads(sys.stdin.read())
model = og.Model(folder)
answers = []
for ids in prompts:
    for share in (False, True):
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(
            max_length=len(ids) + count, do_sample=False, past_present_share_buffer=share
        )
        generator = og.Generator(model, parameters)
        generator.append_tokens(np.array(ids, np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        answers.append([int(i) for i in generator.get_sequence(0)])
tokenizer = og.Tokenizer(model)
tokenizer.update_options(add_special_tokens="true")
encoded = [[int(i) for i in tokenizer.encode(text)] for text in texts]
print(json.dumps([answers, encoded, [tokenizer.decode(np.array(e, np.int32)) for e in encoded]]))
"""


def genai(folder, prompts, count, texts=()):
    """What onnxruntime-genai generates and encodes, in a process of its own."""
    pytest.importorskip("onnxruntime_genai")
    done = subprocess.run(
        [sys.executable, "-c", GENAI],
        input=json.dumps([str(folder), prompts, count, list(texts)]),
        capture_output=True,
        text=True,
        timeout=600,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def greedy(engine, ids, count):
    engine.rewind(0)
    logits, answer = engine.prefill(ids), []
    for _ in range(count):
        answer.append(int(logits.argmax()))
        logits = engine.decode(answer[-1])
    return [*ids, *answer]


@pytest.mark.peer
@pytest.mark.parametrize("generation", GENERATIONS)
def test_onnxruntime_genai_finds_our_tokens_in_a_small_model(tiny_bundles, generation):
    folder = tiny_bundles / f"{generation}-fp32"
    engine = Engine(Bundle.open(folder), threads=1)
    tokenizer = Tokenizer(engine.bundle)
    prompts = [tokenizer.encode(t) for t in ("The gardener waters the", "A", "Seven  stones, 1984")]
    texts = ["The boat", "a  b", "é😀"]
    answers, encoded, decoded = genai(folder, prompts, 24, texts)
    assert encoded == [tokenizer.encode(text) for text in texts]
    assert decoded == texts
    for index, ids in enumerate(prompts):
        ours = greedy(engine, ids, 24)
        if 1 in ours:  # it stops at <eos>
            ours = ours[: ours.index(1)]
        for theirs in answers[2 * index : 2 * index + 2]:
            assert theirs[: len(ours)] == ours


@pytest.mark.peer
@pytest.mark.parametrize("name", ["chat", "chatml"])
def test_onnxruntime_genai_fills_the_chat_template(tiny_bundles, name):
    pytest.importorskip("onnxruntime_genai")
    code = (
        "import json, sys, onnxruntime_genai as og\n"
        "tokenizer = og.Tokenizer(og.Model(sys.argv[1]))\n"
        "text = tokenizer.apply_chat_template(sys.argv[2], add_generation_prompt=True)\n"
        "print(json.dumps([int(i) for i in tokenizer.encode(text)]))"
    )
    messages = [
        {"role": "user", "content": " The boat?\n"},
        {"role": "assistant", "content": "It went down."},
        {"role": "user", "content": "And  then?"},
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, tiny_bundles / name, json.dumps(messages)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    ours = Tokenizer(Bundle.open(tiny_bundles / name))
    turns = [({"assistant": "model"}.get(m["role"], "user"), m["content"]) for m in messages]
    assert json.loads(done.stdout) == ours.encode_chat(turns)


@pytest.mark.peer
@pytest.mark.sample
def test_onnxruntime_genai_finds_our_tokens_in_the_sample(sample_bundle):
    """Where ours is no near-tie: int8 activations make other threads round otherwise."""
    engine = Engine(Bundle.open(sample_bundle))
    tokenizer = Tokenizer(engine.bundle)
    prompts = [
        tokenizer.encode(text)
        for text in ("The three primary colors are", "1, 2, 3, 4, 5, 6,", "def fibonacci(n):\n    ")
    ]
    texts = [text for group in STRINGS.values() for text in group]
    # Known: its interface ends a text at NUL, it does not take U+2581 for a space, and it cuts what
    # has no space for long somewhere.
    texts = [
        text
        for text in texts
        if not CONTROL.search(text)
        and not set("\0\u2581") & set(text)
        and max(map(len, text.split()), default=0) <= 64
    ]
    assert len(texts) > 3_000
    answers, encoded, _ = genai(sample_bundle, prompts, 24, texts)
    different = {
        text: ids for text, ids in zip(texts, encoded, strict=True) if ids != tokenizer.encode(text)
    }
    assert different == {}
    for index, ids in enumerate(prompts):
        for theirs in answers[2 * index : 2 * index + 2]:
            engine.rewind(0)
            rows = np.concatenate(list(engine.all_logits(theirs[:-1])))[len(ids) - 1 :]
            chosen = rows[np.arange(len(rows)), theirs[len(ids) :]]
            assert (rows.max(axis=1) - chosen).max() < 0.2
