"""The page: a picture and a question on top, two methods side by side below, where the model looks at the end."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr
from PIL import Image

import vlm_attn
from vlm_attn.scenes.seeds import CALIBRATION_SEEDS
from vlm_attn.scenes.world import make_scene, render
from vlm_attn_demo import overlays, parameters
from vlm_attn_demo.run import MAX_QUESTION, MAX_UPLOAD, Reply, Runner, open_upload

PLAIN = "plain model"
EDGE = 384
KEPT = "Visual tokens kept"
EXAMPLES = tuple(CALIBRATION_SEEDS[i] for i in (19, 8, 27, 16, 30, 46))
QUESTIONS = (
    "Describe this image.",
    "Is there a dog in the image?",
    "Is there a cup in the image?",
    "How many objects are in the image?",
    "What place is this?",
)
KINDS = {"what the question adds": "contrast", "raw attention": "attention"}

CSS = """
.gradio-container { max-width: 1180px !important; margin: 0 auto !important; }
#head h1 { font-size: 1.6rem; margin: 0 0 .2rem 0; }
#head p { margin: 0; opacity: .8; }
.note { font-size: .95rem; padding: .55rem .8rem; border-radius: 8px; border-left: 4px solid #94a3b8;
        background: var(--background-fill-secondary); }
.note.error { border-left-color: #dc2626; }
.note.busy { border-left-color: #2563eb; }
.note.ok { border-left-color: #16a34a; }
.facts { display: flex; gap: .4rem; flex-wrap: wrap; min-height: 1.9rem; }
.facts span { font-size: .85rem; padding: .15rem .6rem; border-radius: 999px;
              background: var(--background-fill-secondary); border: 1px solid var(--border-color-primary); }
.facts b { font-weight: 650; }
.html-container { padding: 0 !important; }
.summary { font-size: .88rem; color: var(--body-text-color-subdued); }
.side-summary { min-height: 2.6rem; }
.side-summary::first-letter { text-transform: uppercase; }
.gradio-container .parameters { max-height: 330px; overflow-y: auto; }
#question textarea { min-height: 44px; line-height: 1.6; }
#ask { min-height: 44px; }
#try { gap: .5rem; flex-wrap: wrap; }
#try button { flex: 0 1 auto; white-space: nowrap; font-weight: 400; padding: .35rem .8rem; }
footer { display: none !important; }
"""


def launch_options() -> dict[str, Any]:
    """Options of ``Blocks.launch`` that belong to this page: looks, limits, nothing fetched from elsewhere."""
    system = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif"]
    mono = ["ui-monospace", "DejaVu Sans Mono", "monospace"]
    return {
        "theme": gr.themes.Soft(primary_hue="blue", font=system, font_mono=mono),
        "css": CSS,
        "share": False,
        "ssr_mode": False,
        "footer_links": [],
        "max_file_size": MAX_UPLOAD,
        "state_session_capacity": 64,
    }


def note(kind: str, text: str) -> str:
    """The status line; ``text`` is shown as text, whatever it holds."""
    return f'<div class="note {kind}" role="status">{html.escape(text)}</div>'


def facts(reply: Reply) -> str:
    """Time and tokens of one answer as a row of chips."""
    stats = reply.stats
    chips = [f"<b>{reply.seconds:.2f} s</b> in all"]
    times = stats.get("times") or {}
    if "prefill_s" in times:
        chips.append(f"<b>{1000 * times['prefill_s']:.0f} ms</b> prefill")
    total = stats.get("visual_tokens")
    if total is not None:
        kept = (stats.get("kept_tokens") or {}).get("last", total)
        chips.append(f"<b>{kept:g} of {total}</b> visual tokens kept")
    edited = sum((stats.get("edited_heads") or {}).values())
    if edited:
        chips.append(f"<b>{edited:,}</b> attention rows edited")
    return '<div class="facts">' + "".join(f"<span>{chip}</span>" for chip in chips) + "</div>"


class Side:
    """One of the two columns: a method, its controls, its answer."""

    def __init__(self, letter: str, rows: Sequence[Any], chosen: str) -> None:
        self.rows = {row.name: row for row in rows}
        self.wanted = {name: parameters.parameters(row.cls) for name, row in self.rows.items()}
        names = [PLAIN, *self.rows]
        self.method = gr.Dropdown(names, value=chosen, label=f"Method {letter}", elem_id=f"method-{letter}")
        self.summary = gr.HTML(self._summary(chosen), padding=False)
        self.controls: list[Any] = []
        self.groups: list[Any] = []
        with gr.Accordion("Parameters", open=False, elem_id=f"parameters-{letter}", elem_classes="parameters"):
            for name in names:
                with gr.Group(visible=name == chosen) as group:
                    if not self.wanted.get(name):
                        gr.HTML('<div class="summary">Nothing to set.</div>', padding=False)
                    for wanted in self.wanted.get(name, ()):
                        self.controls.append(_control(wanted, f"{letter}-{name}-{wanted.name}"))
                self.groups.append(group)
        self.answer = gr.Textbox(label=f"Answer {letter}", lines=3, interactive=False, elem_id=f"answer-{letter}")
        self.facts = gr.HTML('<div class="facts"></div>', padding=False, elem_id=f"facts-{letter}")
        self.mask = gr.Image(
            label=KEPT, interactive=False, height=EDGE, buttons=["download", "fullscreen"],
            elem_id=f"mask-{letter}", alt_text=f"The picture; visual tokens that method {letter} drops are dark",
        )  # fmt: skip
        self.method.change(
            self._switched, self.method, [self.summary, *self.groups], api_visibility="private", queue=False
        )

    @property
    def inputs(self) -> list[Any]:
        """What an answer of this side depends on."""
        return [self.method, *self.controls]

    @property
    def outputs(self) -> list[Any]:
        """What an answer fills."""
        return [self.answer, self.facts, self.mask]

    def build(self, shown: Sequence[Any]) -> Any:
        """The method object for the values of ``inputs``; None for the plain model."""
        name, values = shown[0], list(shown[1:])
        if name == PLAIN:
            return None
        if name not in self.wanted:
            raise ValueError(f"There is no method '{name}'.")
        start = 0
        for other, wanted in self.wanted.items():
            if other == name:
                return vlm_attn.method(name, **parameters.values(wanted, values[start : start + len(wanted)]))
            start += len(wanted)
        raise AssertionError("unreachable")

    def _summary(self, name: str) -> str:
        if name == PLAIN:
            return '<div class="summary side-summary">The model as it is: what the other side is compared with.</div>'
        row = self.rows[name]
        paper = f" <i>{html.escape(row.paper)}</i>" if row.paper else ""
        return f'<div class="summary side-summary">{html.escape(row.summary)}{paper}</div>'

    def _switched(self, name: str) -> list[Any]:
        return [self._summary(name), *(gr.Group(visible=name == other) for other in (PLAIN, *self.rows))]


def _control(wanted: parameters.Parameter, elem_id: str) -> Any:
    label, info, value = wanted.name.replace("_", " "), wanted.help or None, parameters.to_control(wanted)
    if wanted.kind == "flag":
        return gr.Checkbox(value=bool(value), label=label, info=info, elem_id=elem_id)
    if wanted.kind == "choice":
        return gr.Dropdown(list(wanted.choices), value=value, label=label, info=info, elem_id=elem_id)
    if wanted.kind == "number" and wanted.low is not None and wanted.high is not None:
        return gr.Slider(wanted.low, wanted.high, value, step=0.01, label=label, info=info, elem_id=elem_id)
    if wanted.kind in ("whole", "number"):
        precision = 0 if wanted.kind == "whole" else None
        step = 1 if wanted.kind == "whole" else 0.05
        return gr.Number(value, label=label, info=info, precision=precision, step=step, elem_id=elem_id)
    return gr.Textbox(value, label=label, info=info, placeholder="none", elem_id=elem_id)


def build(runner: Runner) -> gr.Blocks:
    """The page for one loaded model."""
    rows = vlm_attn.methods()
    names = [row.name for row in rows]
    first = make_scene(EXAMPLES[0])
    with gr.Blocks(title="vlm-attn", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        picture = gr.State(first.image, time_to_live=3600)
        gr.Markdown(
            "# vlm-attn\nOne picture, one question, two ways of attending to it. "
            f"The model is **{html.escape(runner.name)}**.",
            elem_id="head",
        )
        with gr.Row(equal_height=False):
            with gr.Column(min_width=260):
                shown = gr.Image(
                    render(first, 480), label="Picture", interactive=False, height=EDGE, buttons=[],
                    elem_id="picture", alt_text="The picture that the question is about",
                )  # fmt: skip
            with gr.Column(min_width=260):
                heat = gr.Image(
                    label="Where the plain model looks", interactive=False, height=EDGE,
                    buttons=["download", "fullscreen"], elem_id="heat",
                    alt_text="The picture under a heatmap of the model's attention for this question",
                )  # fmt: skip
            with gr.Column(min_width=260):
                gallery = gr.Gallery(
                    [render(make_scene(seed), 160) for seed in EXAMPLES], label="Example pictures", show_label=False,
                    columns=3, height=EDGE - 152, allow_preview=False, buttons=[], object_fit="cover",
                    elem_id="examples",
                )  # fmt: skip
                upload = gr.File(label="Or your own picture", height=136, elem_id="upload")
                sent = gr.File(visible=False)
        with gr.Row(equal_height=False, elem_id="asking"):
            question = gr.Textbox(
                QUESTIONS[0], show_label=False, container=False, scale=5, max_lines=3, max_length=MAX_QUESTION,
                placeholder="A question about the picture", elem_id="question",
            )  # fmt: skip
            ask = gr.Button("Ask both", variant="primary", scale=1, min_width=140, elem_id="ask")
        with gr.Row(elem_id="try"):
            for text in QUESTIONS:  # filled in by the browser: a press of Ask right afterwards asks this question
                gr.Button(text, size="sm", min_width=80).click(
                    None, None, question, js=f"() => {json.dumps(text)}", api_visibility="private"
                )
        status = gr.HTML(
            note("", "Choose a picture, type a question and press Ask both."), padding=False, elem_id="status"
        )
        with gr.Row(equal_height=False):
            with gr.Column(min_width=300):
                left = Side("A", rows, PLAIN)
            with gr.Column(min_width=300):
                right = Side("B", rows, "fastv" if "fastv" in names else PLAIN)
        with gr.Accordion("Settings", open=False, elem_id="settings"):
            kind = gr.Radio(list(KINDS), value=next(iter(KINDS)), label="Heatmap", elem_id="kind")
            length = gr.Slider(4, 128, 48, step=4, label="Longest answer in tokens", elem_id="length")
        gr.HTML(
            '<div class="summary">White frames: visual tokens that stayed to the last layer. Times are single runs on '
            "the machine that serves this page: they show the order of things and are no measurement.</div>",
            padding=False,
        )

        def pick(event: gr.SelectData) -> tuple[Any, ...]:
            seed = EXAMPLES[int(event.index) % len(EXAMPLES)]
            scene = make_scene(seed)
            return scene.image, render(scene, 480), note("ok", "Example picture chosen."), *cleared()

        def receive(path: str) -> tuple[Any, ...]:
            try:
                opened = open_upload(path)
            except ValueError as error:
                return gr.skip(), gr.skip(), note("error", f"This file was not taken: {error}"), *cleared(True)
            size = f"{opened.width} x {opened.height} pixels"
            return opened, overlays.shown(opened), note("ok", f"Your picture is in ({size})."), *cleared()

        def cleared(keep: bool = False) -> list[Any]:
            return [gr.skip()] * 7 if keep else ["", facts_none, None, "", facts_none, None, None]

        facts_none = '<div class="facts"></div>'

        def run(
            image: Image.Image | None, text: str, style: str, limit: int, *shown_values: Any
        ) -> Iterator[list[Any]]:
            yield from _run(runner, (left, right), image, text, KINDS.get(style, "contrast"), int(limit), shown_values)

        results = [*left.outputs, *right.outputs, heat]
        inputs = [picture, question, kind, length, *left.inputs, *right.inputs]
        private: dict[str, Any] = {"api_visibility": "private"}
        asking = gr.on([ask.click, question.submit], run, inputs, [status, *results], **private, concurrency_limit=1)
        # The last picture given is the one that stays: the answer about the one before ends, and each is taken, one
        # after the other (Gradio's default drops what comes while another is handled).
        gr.on([gallery.select, upload.upload], None, cancels=asking, **private)
        taken = [picture, shown, status, *results]
        turn: dict[str, Any] = {"trigger_mode": "multiple", "concurrency_id": "picture", **private}
        gallery.select(pick, None, taken, **turn)
        # The browser empties the upload area before the file is handled, so that the next one can be dropped at once.
        emptied = upload.upload(None, upload, [sent, upload], js="file => [file, null]", **turn)
        emptied.then(receive, sent, taken, show_progress_on=[shown, status, upload], **turn)
    page.queue(max_size=32, api_open=False)
    return page


def _run(
    runner: Runner,
    sides: tuple[Side, Side],
    image: Image.Image | None,
    text: str,
    kind: str,
    limit: int,
    values: Sequence[Any],
) -> Iterator[list[Any]]:
    """The updates of one press of the button: status, then three per side, then the heatmap."""
    cells: list[Any] = ["", '<div class="facts"></div>', None] * 2 + [None]
    if image is None:
        yield [note("error", "Choose a picture first."), *cells]
        return
    split = len(sides[0].inputs)
    troubles = []

    def page(kind: str, text: str) -> list[Any]:
        # Gradio takes update mappings apart, so each step gets copies
        return [note(kind, text), *(dict(cell) if isinstance(cell, dict) else cell for cell in cells)]

    for number, (side, shown) in enumerate(zip(sides, (values[:split], values[split:]), strict=True)):
        place, busy = 3 * number, f"Method {'AB'[number]} is answering ..."
        yield page("busy", busy)
        try:
            for reply in runner.answer(image, text, side.build(shown), min(max(limit, 1), 256)):
                cells[place] = reply.text
                if reply.done:
                    cells[place + 1 : place + 3] = [facts(reply), _given(runner, image, reply)]
                yield page("busy", busy)
        except (ValueError, TypeError) as error:
            troubles.append(f"Method {'AB'[number]}: {error}")
    if len(troubles) < 2:
        yield page("busy", "Reading where the model looks ...")
        try:
            cells[6] = overlays.heat_overlay(image, runner.heatmap(image, text, kind))
        except (ValueError, TypeError) as error:
            troubles.append(f"Heatmap: {error}")
    if len(troubles) > 1 and len({trouble.partition(": ")[2] for trouble in troubles}) == 1:
        troubles = [troubles[0].partition(": ")[2]]
    yield page("error", " ".join(troubles)) if troubles else page("ok", "Done.")


def _given(runner: Runner, image: Image.Image, reply: Reply) -> dict[str, Any]:
    """What a method left of the picture: kept cells, or the picture that it made of it."""
    if reply.picture is not None:
        return gr.update(value=overlays.shown(reply.picture), label="The picture that the method added")
    grids, kept = reply.stats.get("grid"), reply.stats.get("kept_cells")
    if not grids or grids[0] is None:
        return gr.update(value=None, label=KEPT)
    if not kept or kept[0] is None:
        return gr.update(value=overlays.shown(image), label=f"{KEPT}: all")
    boxes = runner.cell_boxes(image, grids[0])
    drawn = overlays.kept_overlay(image, boxes, kept[0])
    return gr.update(value=drawn, label=f"{KEPT}: {len(kept[0])} of {len(boxes)}")
