"""The lmms-eval plug-in: registration, argument strings, requests, batches, stop strings; no network."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

pytest.importorskip("lmms_eval")

from lmms_eval.api.instance import Instance

from tests import models
from tests.eval_fakes import FakeVlm
from vlm_attn.evaluation.answers import cut_at, generation_settings, plain, sample_seed
from vlm_attn.evaluation.compute import counted
from vlm_attn.evaluation.lmms import VlmAttnChat, parse_method
from vlm_attn.wrap import VLM

DOCS = [{"question": "Is there a dog in the image?"}, {"question": "Describe it."}]


def messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
    picture = Image.new("RGB", (8, 8), "red")
    text = {"type": "text", "text": doc["question"]}
    return [{"role": "user", "content": [{"type": "image", "url": picture}, text]}]


def request(doc_id: int, **settings: Any) -> Instance:
    args = (DOCS[doc_id]["question"], messages, {"max_new_tokens": 8, "until": [], **settings}, doc_id, "two", "test")
    return Instance(
        request_type="generate_until",
        arguments=args,
        idx=0,
        metadata={"task": "two", "doc_id": doc_id, "repeats": 1},
    )


def chat(**options: Any) -> VlmAttnChat:
    vlm = FakeVlm()
    model = VlmAttnChat.from_vlm(lambda: vlm, **options)
    model.task_dict["two"] = {"test": DOCS}
    return model


def test_the_entry_point_resolves_to_the_chat_class() -> None:
    from lmms_eval.models import MODEL_REGISTRY_V2

    resolved = MODEL_REGISTRY_V2.resolve("vlm_attn")
    assert (resolved.model_type, resolved.class_name) == ("chat", "VlmAttnChat")
    assert MODEL_REGISTRY_V2.get_model_class("vlm_attn") is VlmAttnChat


def test_manifest_module_imports_nothing_heavy() -> None:
    import subprocess
    import sys

    code = "import sys, vlm_attn.evaluation.plugin; print(any(m in sys.modules for m in ('torch', 'lmms_eval')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_answers_come_back_in_request_order() -> None:
    out = chat().generate_until([request(1), request(0)])
    assert out[0].text.startswith("A tree")
    assert out[1].text in ("yes", "no")
    assert out[0].token_counts.output_tokens > 1


def test_stop_strings_cut() -> None:
    assert chat().generate_until([request(1, until=["."])])[0].text.count(".") == 0
    assert cut_at("ab\ncd", ["\n", "b"]) == "a"
    assert cut_at("abc", ["", "x"]) == "abc"


def test_failures_are_raised_with_the_sample() -> None:
    model = chat()
    model.vlm.set_method({"name": "broken"})
    with pytest.raises(RuntimeError, match="two, sample 0: RuntimeError: this method always fails"):
        model.generate_until([request(0)])


def test_other_request_types_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="generation tasks"):
        chat().loglikelihood([])
    with pytest.raises(NotImplementedError, match="single-round"):
        chat().generate_until_multi_round([])


def test_generation_settings() -> None:
    asked = {"max_new_tokens": 9, "temperature": 0, "top_p": 0.9, "until": "\n", "num_beams": 1}
    settings, until = generation_settings(asked)
    assert settings == {"max_new_tokens": 9, "do_sample": False, "num_beams": 1}
    assert until == ["\n"]
    assert asked["until"] == "\n"  # the task's own dictionary is left alone
    assert generation_settings({"temperature": 0.7})[0]["do_sample"] is True
    assert generation_settings({}, max_new_tokens=3)[0]["max_new_tokens"] == 3
    with pytest.raises(ValueError, match="Did you mean 'max_new_tokens'"):
        generation_settings({"max_newtokens": 3})


def test_method_argument() -> None:
    assert parse_method(None, {}) is None
    assert parse_method("fastv", {"layer": 2}) == {"name": "fastv", "layer": 2}
    assert parse_method('{"name": "fastv", "layer": 2}', {}) == {"name": "fastv", "layer": 2}
    assert parse_method("""'{"name": "fastv", "layer": 2}'""", {}) == {"name": "fastv", "layer": 2}
    assert parse_method('[{"name": "fastv"}]', {}) == [{"name": "fastv"}]
    assert parse_method("recipes/mine.yaml", {}) == "recipes/mine.yaml"
    with pytest.raises(ValueError, match="JSON"):
        parse_method("{broken", {})
    with pytest.raises(ValueError, match="Did you mean 'batch_size'"):
        parse_method(None, {"batchsize": 2})
    with pytest.raises(ValueError, match="into the file"):
        parse_method("a.yaml", {"layer": 2})


def test_arguments_are_checked_before_anything_is_loaded() -> None:
    with pytest.raises(ValueError, match="Did you mean 'method'"):
        VlmAttnChat.create_from_arg_string("pretrained=nowhere/at-all,methd=fastv")
    with pytest.raises(ValueError, match="batch_size must be a number"):
        chat(batch_size="auto")


def test_sample_seeds_depend_on_identity_only() -> None:
    assert sample_seed(0, "t", 1) == sample_seed(0, "t", 1)
    assert len({sample_seed(s, t, d) for s in (0, 1) for t in ("a", "b") for d in (0, 1)}) == 8


def test_stats_become_plain_data() -> None:
    import numpy as np
    import torch

    value = {"a": np.float32(0.5), 1: torch.tensor([1, 2]), "c": (1, float("nan")), "s": {2, 1}}
    assert plain(value) == {"a": 0.5, "1": [1, 2], "c": [1, None], "s": [1, 2]}


def test_decoder_work_is_tokens_of_an_average_layer() -> None:
    """Prompt and fed-back answer tokens in every layer, less what left, and nothing stays on the model."""
    with VLM(models.build_llava(4), models.tiny_processor()) as vlm:
        hooks = [len(layer._forward_pre_hooks) for layer in vlm.family.layers]
        prompt = vlm.inputs([models.picture()], "w5 w6").input_ids.shape[1]
        with counted(vlm) as work:
            vlm.ask(models.picture(), "w5 w6", max_new_tokens=3)
        assert work.stats() == {"decoder_tokens": prompt + 2}
        assert [len(layer._forward_pre_hooks) for layer in vlm.family.layers] == hooks
        vlm.set_method({"name": "fastv", "layer": 2, "keep": 0.5})
        with counted(vlm) as work:
            vlm.ask(models.picture(), "w5 w6", max_new_tokens=3)
        assert work.stats() == {"decoder_tokens": prompt + 2 - models.N_VISUAL / 2 / 2}  # in two layers of four
    with counted(FakeVlm()) as nothing:
        pass
    assert nothing.stats() == {}
