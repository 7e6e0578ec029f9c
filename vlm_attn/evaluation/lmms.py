"""Our model class for lmms-eval: any model `vlm_attn.wrap` takes, with any method, in any generation task.

    lmms-eval --model vlm_attn --model_args pretrained=llava-hf/llava-1.5-7b-hf,method=fastv,layer=2 --tasks pope

``method`` is a registered name (further keys are its parameters), JSON (``method='{"name": "fastv", "layer": 2}'``, or
a list of such) or the path of a YAML recipe. Every answer goes through `VLM.ask`, so methods that rewrite the request
work; ``batch_size`` above 1 uses padded batches of `VLM.generate` where the method allows it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from lmms_eval import utils
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages

from vlm_attn.evaluation.answers import Produced, cut_at, generation_settings, plain, sample_seed
from vlm_attn.evaluation.cache import ResponseCache
from vlm_attn.evaluation.compute import counted
from vlm_attn.evaluation.kept import masks
from vlm_attn.evaluation.matching import unknown_name
from vlm_attn.evaluation.progress import Bar, single_bar
from vlm_attn.evaluation.ranks import Rank, ShareDone

__all__ = ["Recorder", "VlmAttnChat"]

logger = logging.getLogger(__name__)

LOAD_KEYS = ("attn_implementation", "device_map", "dtype", "revision")
OWN_KEYS = ("pretrained", "method", "batch_size", "max_batch_size", "device", "seed", "max_new_tokens", "cache")


class Recorder(Protocol):
    """Where answers are kept between runs (see `recorder.RunRecorder`)."""

    def recall(self, task: str, doc_id: int, prompt: str, doc: Mapping[str, Any]) -> Produced | None: ...

    def keep(self, task: str, doc_id: int, prompt: str, doc: Mapping[str, Any], produced: Produced) -> None: ...


def parse_method(method: Any, params: Mapping[str, Any]) -> Any:
    """The ``method`` argument of `vlm_attn.wrap` from what a command line can say."""
    if method is None or method in ("", "none", "baseline"):
        if params:
            raise ValueError(unknown_name("model argument", next(iter(params)), (*OWN_KEYS, *LOAD_KEYS)))
        return None
    if not isinstance(method, str):
        if params:
            raise ValueError(f"Put the parameters {sorted(params)} into the method itself.")
        return method
    text = method.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]  # lmms-eval leaves the quotes on that protect the commas of a value
    if text.startswith(("{", "[")):
        try:
            parsed = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"method looks like JSON but is not: {error}. Given: {text!r:.120}") from error
        return parse_method(parsed, params)
    if text.lower().endswith((".yaml", ".yml")):
        if params:
            raise ValueError(f"With a recipe file, put the parameters {sorted(params)} into the file.")
        return text  # the core reads recipes, safely
    return {"name": text, **params}


class VlmAttnChat(lmms):
    """Chat model for lmms-eval backed by `vlm_attn.wrap`.

    - ``pretrained``: hub id, folder or ``scenes``; ``method`` and further keys: see the module text.
    - ``batch_size``: requests per padded batch; ``seed``: mixed with task and sample id into a seed per sample.
    - ``cache``: folder of answers kept across runs (`cache.ResponseCache`).
    - ``max_new_tokens``: replaces the tasks' own; ``device``: ``cpu``, ``cuda`` ...
    - ``dtype``, ``attn_implementation``, ``device_map``, ``revision`` go to the loader.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "scenes",
        method: Any = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        seed: int = 0,
        max_new_tokens: int | None = None,
        cache: str | None = None,
        **extra: Any,
    ) -> None:
        super().__init__()
        load = {key: extra.pop(key) for key in LOAD_KEYS if key in extra}
        spec = parse_method(method, extra)
        import vlm_attn

        if device is not None and "device_map" not in load:
            load["device_map"] = Rank.current().device(device)
        vlm = vlm_attn.wrap(str(pretrained), spec, **load)
        self._setup(lambda: vlm, batch_size, seed, max_new_tokens, cache)

    @classmethod
    def from_vlm(
        cls,
        provide: Callable[[], Any],
        *,
        batch_size: int = 1,
        seed: int = 0,
        max_new_tokens: int | None = None,
        recorder: Recorder | None = None,
        bar: Bar = single_bar,
        rank: Rank | None = None,
        cache: str | None = None,
    ) -> VlmAttnChat:
        """Around a VLM made elsewhere: ``provide()`` is called when an answer is needed, and may load it then.

        With a ``rank``, `generate_until` answers that rank's share of what the recorder lacks and raises `ShareDone`.
        """
        self = cls.__new__(cls)
        lmms.__init__(self)
        self._setup(provide, batch_size, seed, max_new_tokens, cache)
        self.recorder, self.bar, self.rank_of_run = recorder, bar, rank
        return self

    def _setup(
        self,
        provide: Callable[[], Any],
        batch_size: int | str,
        seed: int,
        max_new_tokens: int | None,
        cache: str | None,
    ) -> None:
        if isinstance(batch_size, str) and not batch_size.isdigit():
            raise ValueError(f"batch_size must be a number, got {batch_size!r}: automatic sizes are not supported.")
        self._provide = provide
        self.batch_size = int(batch_size)
        self.seed = int(seed)
        self.max_new_tokens = max_new_tokens
        self.recorder: Recorder | None = None
        self.bar: Bar = single_bar
        self.warmup = 0
        self.rank_of_run: Rank | None = None
        self.cache = ResponseCache(cache) if cache else None

    @property
    def vlm(self) -> Any:
        return self._provide()

    @property
    def device(self) -> Any:
        return self.vlm.model.device

    def clean(self) -> None:
        """Keep the model: the same object answers for the next method."""

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("vlm_attn answers generation tasks; choose tasks with output_type: generate_until.")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("vlm_attn answers single-round generation tasks only.")

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer every request, in the order given. A failure stops the run and names its sample."""
        collator = utils.Collator(
            [request.args for request in requests],
            sort_fn=lambda args: args[3],
            group_fn=lambda args: args[2],
            grouping=True,
        )
        answers: list[GenerationResult] = []
        batches = [list(batch) for batch in collator.get_batched(n=self.batch_size)]
        if self.rank_of_run:  # whole batches, because padding may change the last bits of an answer
            batches = self.rank_of_run.share([batch for batch in batches if None in self._recalled(batch)])
        with self.bar(sum(map(len, batches))) as advance:
            for batch in batches:
                if self.rank_of_run:
                    self.rank_of_run.check_launcher()
                answers += self._batch(batch)
                advance(len(batch))
        if self.rank_of_run:
            raise ShareDone
        return list(collator.get_original(answers))

    def _recalled(self, batch: list[tuple[Any, ...]]) -> list[Produced | None]:
        """The stored answers of a batch, None where there is none."""
        if self.recorder is None:
            return [None] * len(batch)
        return [
            self.recorder.recall(task, doc_id, ctx, self.task_dict[task][split][doc_id])
            for ctx, _, _, doc_id, task, split in batch
        ]

    def _batch(self, batch: list[tuple[Any, ...]]) -> list[GenerationResult]:
        docs = [self.task_dict[task][split][doc_id] for *_, doc_id, task, split in batch]
        kept = self._recalled(batch)
        if any(item is None for item in kept):
            # The whole batch is computed again even if part of it is known: the composition of a padded batch may
            # change the last bits of an answer, and a continued run must equal an uninterrupted one.
            for place, produced in enumerate(self._produce(batch, docs)):
                if kept[place] is None:
                    kept[place] = produced
                    if self.recorder:
                        ctx, _, _, doc_id, task, _ = batch[place]
                        self.recorder.keep(task, doc_id, ctx, docs[place], produced)
        results = []
        for item, (ctx, _, asked, *_) in zip(kept, batch, strict=True):
            produced = item or Produced("", 0)
            self.cache_hook.add_partial("generate_until", (ctx, asked), produced.text)
            results.append(GenerationResult(produced.text, TokenCounts(output_tokens=produced.n_tokens)))
        return results

    def _produce(self, batch: list[tuple[Any, ...]], docs: list[Any]) -> list[Produced]:
        vlm = self.vlm  # loading errors are the model's or the method's, not a sample's
        chats = [ChatMessages(messages=args[1](doc)) for args, doc in zip(batch, docs, strict=True)]
        settings, until = generation_settings(batch[0][2], self.max_new_tokens)
        _, _, _, doc_id, task, _ = batch[0]
        try:
            produced = self._cached(vlm, chats, settings, task, doc_id)
        except Exception as error:
            ids = ", ".join(str(args[3]) for args in batch)
            raise RuntimeError(f"{task}, sample {ids}: {type(error).__name__}: {error}") from error
        for item in produced:
            item.text, item.settings = cut_at(item.text, until), settings
        return produced

    def _cached(
        self, vlm: Any, chats: list[ChatMessages], settings: dict[str, Any], task: str, doc_id: int
    ) -> list[Produced]:
        """Answers of a batch from the cache if all of them are there, else from the model."""
        keys = self.cache.keys(vlm, chats, settings, sample_seed(self.seed, task, doc_id)) if self.cache else []
        found = [self.cache.get(key) for key in keys] if self.cache else [None]
        if None not in found:
            return [produced for produced in found if produced]
        while self.warmup > 0:
            self.warmup -= 1
            self._answer(vlm, chats, settings, task, doc_id)
        produced = self._answer(vlm, chats, settings, task, doc_id)
        if self.cache:
            for key, item in zip(keys, produced, strict=True):
                self.cache.put(key, item)
        return produced

    def _answer(
        self, vlm: Any, chats: list[ChatMessages], settings: dict[str, Any], task: str, doc_id: int
    ) -> list[Produced]:
        seed_all(vlm.model, sample_seed(self.seed, task, doc_id))
        batches = [[chat] for chat in chats] if one_by_one(vlm) else [chats]
        out: list[Produced] = []
        for batch in batches:
            produced = self._one(vlm, batch[0], settings) if len(batch) == 1 else self._padded(vlm, batch, settings)
            if doc_id == 0:  # one picture per benchmark is drawn in the report
                for item, mask in zip(produced, masks(vlm, [chat.extract_media()[0] for chat in batch]), strict=True):
                    item.stats |= mask
            out += produced
        return out

    def _one(self, vlm: Any, chat: ChatMessages, settings: dict[str, Any]) -> list[Produced]:
        images, text = single_turn(chat)
        if text is None:
            return self._padded(vlm, [chat], settings)
        with counted(vlm) as work:
            answer = vlm.ask(images[0] if len(images) == 1 else images or None, text, **settings)
        return [Produced(answer.text, n_tokens(answer), plain(answer.stats) | work.stats())]

    def _padded(self, vlm: Any, chats: list[ChatMessages], settings: dict[str, Any]) -> list[Produced]:
        """Several conversations in one left-padded batch, or one with a system prompt or several turns."""
        from time import perf_counter

        processor, start = vlm.processor, perf_counter()
        prompts = [
            processor.apply_chat_template(chat.to_hf_messages(), add_generation_prompt=True, tokenize=False)
            for chat in chats
        ]
        images = [chat.extract_media()[0] for chat in chats]
        inputs = processor(
            text=prompts,
            images=images if any(images) else None,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(vlm.model.device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(vlm.model.dtype)
        with counted(vlm) as work:
            output = vlm.generate(**inputs, **settings)
        new = output[:, inputs["input_ids"].shape[1] :]
        texts = processor.batch_decode(new, skip_special_tokens=True)
        pad = processor.tokenizer.pad_token_id
        share = (perf_counter() - start) / len(chats)
        return [
            Produced(text, int((row != pad).sum()), {"times": {"total_s": share}} | work.stats(len(chats)))
            for text, row in zip(texts, new, strict=True)
        ]


def seed_all(model: Any, seed: int) -> None:
    """``torch.manual_seed``, without its queue of calls for devices that nothing runs on (each keeps a stack trace,
    which costs more than all else that is done around a sample of a small model)."""
    import torch

    if getattr(getattr(model, "device", None), "type", "cpu") == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def n_tokens(answer: Any) -> int:
    """Number of generated tokens of an `Answer` (a count, or the ids themselves)."""
    tokens = answer.tokens
    return int(tokens) if isinstance(tokens, int) else int(getattr(tokens, "numel", lambda: len(tokens))())


def single_turn(chat: ChatMessages) -> tuple[list[Any], str | None]:
    """Images and text of a chat that is one user turn (text None otherwise, or with the image after the text)."""
    images, videos, audios = chat.extract_media()
    if videos or audios:
        raise ValueError("vlm_attn takes images and text; this task sends video or audio.")
    content = chat.messages[0].content
    kinds = [part.type for part in content]
    if len(chat.messages) != 1 or chat.messages[0].role != "user" or kinds != ["image"] * len(images) + ["text"]:
        return images, None
    return images, content[-1].text


def one_by_one(vlm: Any) -> bool:
    """Whether the method in place rewrites the request or runs a second branch (then: one request at a time)."""
    return any(method.stage in ("refine", "decode") for method in getattr(vlm, "methods", ()))
