"""What a visitor sees and touches: one :class:`Page` for every open tab, drawn by NiceGUI."""

from __future__ import annotations

import json as jsonlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from nicegui import events, run, ui

from kvferry.errors import InputError, KVFerryError
from kvferry.recipe import Recipe
from kvferry.studio import drawing, fragments, menus
from kvferry.studio.bench import Bench, View
from kvferry.studio.crossing import CrossingPanel
from kvferry.studio.examples import examples
from kvferry.studio.live import Shelf
from kvferry.studio.menus import STEPS, Menus
from kvferry.studio.uploads import MAX_UPLOAD, picture_of

STYLE = Path(__file__).with_name("style.css")
BROKEN = "Something broke that should not; the terminal that runs the studio says what."
SENT_FIRST = {"A": "ask, then ship (A)", "B": "ship, then ask (B)"}
ALIEN = "{} knows drawn scenes only: of another picture believe the bytes, not the answer."
LOOKS = {"kept": "kept tokens", "heat": "how many heads", "plain": "picture"}
ALL = "all layers"
OPTION = """<q-item v-bind="props.itemProps"><q-item-section><q-item-label>{{ props.opt.label }}</q-item-label>
<q-item-label caption>{{ (SENTENCES)[props.opt.label] }}</q-item-label></q-item-section></q-item>"""

log = logging.getLogger(__name__)


class Page:
    """One tab: what it asks, what it sees, and the elements that show it."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._model = shelf.names[0]
        self._recipe = Recipe.parse(menus.DEFAULT_RECIPE)
        self._menus = Menus.of(self._recipe)
        self._pictures: tuple[Any, ...] = ()
        self._example: int | None = None
        self._bench: Bench | None = None
        self._view: View | None = None
        self._layer: int | None = None
        self._busy = self._again = self._setting = False
        ui.add_css(STYLE)
        ui.colors(primary="#0072b2", secondary="#56b4e9", accent="#e69f00", positive="#009e73", negative="#d55e00")
        self._draw()
        ui.timer(0.05, lambda: self._choose(0), once=True)

    # what the page is made of

    def _draw(self) -> None:
        with ui.element("header").classes("top"):
            ui.html("kvferry studio", tag="h1")
            ui.html("which tokens of a picture's cache stay, what they cost, and what the answer becomes", tag="p")
            self._spinner = ui.spinner(size="22px").props('aria-label="computing"')
            models = ui.select(list(self._shelf.names), value=self._model, label="model").props("dense outlined")
            models.classes("model").style("min-width: 170px").on_value_change(self._change_model)
            self._protocol = ui.toggle(SENT_FIRST, value="A").props("dense no-caps unelevated").classes("protocol")
            self._protocol.on_value_change(self._ask)
        self._complaint = ui.label().classes("complaint").props('role="alert"')
        self._complaint.set_visibility(False)
        with ui.element("main").classes("studio") as self._main:
            with ui.element("div").classes("side"):
                self._draw_question()
                self._draw_recipe()
            self._draw_picture()
            with ui.element("div").classes("side"):
                self._draw_results()
        with ui.element("div").classes("below"):
            self._live = CrossingPanel(self._shelf, self._asked, self._guarded)

    def _draw_question(self) -> None:
        with _panel("Picture and question"):
            self._thumbs = []
            with ui.element("div").classes("thumbs"):
                for index, example in enumerate(examples()):
                    source = drawing.data_uri(drawing.plain(example.pictures[0].resize((96, 96))), 80)
                    thumb = ui.element("img").props(f'alt="example {index + 1}"').tooltip(example.question)
                    thumb.props["src"] = source
                    thumb.on("click", lambda _, chosen=index: self._choose(chosen))
                    self._thumbs.append(thumb)
            ui.upload(
                label="drop a picture here, or press +", auto_upload=True, max_file_size=MAX_UPLOAD,
                on_upload=self._upload, on_rejected=self._reject,
            ).props('accept="image/*" flat')  # fmt: skip
            with ui.element("div").classes("line"):
                self._question = ui.textarea("question").props("dense outlined autogrow").classes("grow question")
                self._question.on("keydown.enter.prevent", self._ask)
                ui.button("Ask", on_click=self._ask).props("unelevated no-caps").classes("ask")
            self._note = ui.html("", tag="small")

    def _draw_recipe(self) -> None:
        with _panel("Recipe"):
            self._scorer = self._menu("selection", menus.scorers(), "scorer")
            with ui.element("div").classes("line budget"):
                ui.html("keep", tag="span")
                self._percent = ui.html("", tag="b")
                self._tokens = ui.html("", tag="span")
            self._slider = ui.slider(min=0, max=len(STEPS) - 1, value=0).classes("slider").props('aria-label="budget"')
            self._slider.on_value_change(lambda event: self._turn("percent", STEPS[int(event.value)]))
            with ui.element("div").classes("line"):
                self._budget = self._menu("budget", menus.budgets(), "budget", "grow")
                self._modality = self._menu("modality", menus.policies(), "modality", "grow")
            self._merge = self._menu("merge", menus.merges(), "merge")
            with ui.element("div").classes("line"):
                self._codec = self._menu("codec", menus.codecs(), "codec", "grow")
                self._zstd = ui.switch("zstd").props("dense").tooltip("a lossless stage, where it helps")
            self._zstd.on_value_change(lambda event: self._turn("zstd", bool(event.value)))
            self._typed = ui.textarea("recipe, as it is written elsewhere").classes("mono recipe")
            self._typed.props("dense outlined autogrow")
            self._typed.on("keydown.enter.prevent", self._type).on("blur", self._type)
            self._explained = ui.html("", tag="small")

    def _menu(self, label: str, options: dict[str, str], part: str, classes: str = "") -> ui.select:
        menu = ui.select(list(options), label=label).classes(f"menu-{part} {classes}")
        menu.props("dense outlined options-dense")
        menu.add_slot("option", OPTION.replace("SENTENCES", jsonlib.dumps(options)))
        menu.on_value_change(lambda event: self._turn(part, event.value))
        return menu

    def _draw_picture(self) -> None:
        with _panel("What is kept of it"):
            self._shown = ui.element("div").classes("pictures")
            with ui.element("div").classes("line"):
                self._look = ui.toggle(LOOKS, value="kept").props("dense no-caps unelevated").classes("look")
                self._look.on_value_change(self._show_kept)
                with ui.element("div").classes("line grow scale") as self._scale:
                    ui.html("none", tag="small")
                    ui.element("div").classes("ramp")
                    ui.html("all heads", tag="small")
                self._scale.bind_visibility_from(self._look, "value", value="heat")
            with ui.element("div").classes("line"):
                self._layer_name = ui.html(ALL, tag="span").style("min-width: 84px")
                self._layers = ui.slider(min=0, max=1, value=0).classes("grow layer").props('aria-label="layer"')
                self._layers.on_value_change(self._turn_layer)
            self._by_layer = ui.html("", sanitize=False)
            ui.html("how much of the picture each layer keeps", tag="small")
            self._words = ui.html("", sanitize=False)

    def _draw_results(self) -> None:
        with _panel("What crosses"):
            self._headline = ui.html("", sanitize=False)
            self._sizes = ui.html("", sanitize=False)
        with _panel("What it answers"):
            self._answers = ui.html("", sanitize=False)
        with _panel("Where the bytes are"):
            self._parts = ui.html("", sanitize=False)
            self._times = ui.html("", tag="small")

    # what a visitor does

    async def _choose(self, index: int) -> None:
        self._pictures, self._question.value = examples()[index].pictures, examples()[index].question
        self._example = index
        self._mark()
        await self._ask()

    async def _upload(self, event: events.UploadEventArguments) -> None:
        async def take() -> None:
            data = await event.file.read()
            self._pictures = (await run.io_bound(picture_of, data, event.file.name),)
            self._example = None
            self._mark()

        event.sender.reset()
        if await self._guarded(take):
            await self._ask()

    def _reject(self) -> None:
        self._complain(f"a picture here has at most {MAX_UPLOAD >> 20} MB and is one file; make it smaller")

    def _mark(self) -> None:
        for index, thumb in enumerate(self._thumbs):
            chosen = index == self._example
            thumb.classes(add="chosen" if chosen else "", remove="" if chosen else "chosen")
        alien = self._example is None and self._model.startswith("testbed/")
        self._note.content = ALIEN.format(self._model) if alien else ""

    async def _change_model(self, event: events.ValueChangeEventArguments[Any]) -> None:
        self._model = event.value
        self._mark()
        await self._ask()

    async def _ask(self) -> None:
        self._bench = None
        await self._refresh()

    async def _turn(self, part: str, value: Any) -> None:
        if self._setting or value is None:
            return

        async def change() -> None:
            turned = replace(self._menus, **{part: value})
            self._recipe = Recipe.parse(turned.recipe)
            self._menus = turned

        if await self._guarded(change):
            await self._refresh()
        else:
            self._set_menus()

    async def _type(self) -> None:
        async def change() -> None:
            self._recipe = Recipe.parse(self._typed.value)
            self._menus = Menus.of(self._recipe, self._menus.percent)

        if self._typed.value.strip() != str(self._recipe) and await self._guarded(change):
            await self._refresh()

    def _turn_layer(self, event: events.ValueChangeEventArguments[Any]) -> None:
        self._layer = None if not event.value else int(event.value) - 1
        self._show_kept()

    # what the page does

    def _asked(self) -> tuple[str, Bench, str]:
        """Model, prompt and recipe to send; raises where there is nothing to see yet."""
        if self._bench is None or self._view is None:
            raise InputError("there is nothing to send yet; ask a question first")
        return self._model, self._bench, str(self._view.recipe)

    async def _refresh(self) -> None:
        """Look again; while one look is under way, only the newest wish waits."""
        self._again = True
        if self._busy:
            return
        self._busy = True
        self._spinner.set_visibility(True)
        try:
            while self._again:
                self._again = False
                self._set_menus()
                fresh = await self._guarded(self._look_once)
                self._main.classes(add="" if fresh else "stale", remove="stale" if fresh else "")
        finally:
            self._busy = False
            self._spinner.set_visibility(False)

    async def _look_once(self) -> None:
        vlm = await run.io_bound(self._shelf.model, self._model)
        if self._bench is None or self._bench.vlm is not vlm:
            pictures = self._pictures if vlm.has_vision else ()
            ship_first = self._protocol.value == "B"
            self._bench = Bench(vlm, pictures, self._question.value or "", ship_first=ship_first)
        self._view = await run.io_bound(self._bench.view, self._recipe)
        self._show(self._view)

    async def _guarded(self, work: Callable[[], Awaitable[None]]) -> bool:
        """Do something that may fail; a failure is a sentence on the page."""
        try:
            await work()
        except KVFerryError as error:
            self._complain(str(error))
            return False
        except Exception:
            log.exception("the studio failed")
            self._complain(BROKEN)
            return False
        self._complaint.set_visibility(False)
        return True

    def _complain(self, text: str) -> None:
        self._complaint.text = text
        self._complaint.set_visibility(True)

    def _set_menus(self) -> None:
        """Let every menu stand where the recipe is, without taking that for a wish."""
        self._setting = True
        now = self._menus
        for menu, value in (
            (self._scorer, now.scorer), (self._budget, now.budget), (self._modality, now.modality),
            (self._merge, now.merge), (self._codec, now.codec),
        ):  # fmt: skip
            if value not in menu.options:
                menu.set_options([*menu.options, value])
            menu.value = value
        free = menus.takes_budget(now.scorer)
        for element in (self._slider, self._budget, self._modality):
            element.set_enabled(free)
        self._slider.value = menus.nearest_step(now.percent)
        self._zstd.value = now.zstd
        self._typed.value = str(self._recipe)
        self._percent.content = f"{now.percent:g} %" if free else "what it says"
        self._explained.content = _explanation(self._recipe)
        self._setting = False

    # what is shown

    def _show(self, view: View) -> None:
        self._layers.props["max"] = view.layers
        if self._layer is not None and self._layer >= view.layers:
            self._layers.value = 0
        mean = sum(view.report.kept.layers) / view.layers
        self._tokens.content = f"{mean:.0f} of {view.report.length} a layer"
        self._headline.content = fragments.headline(view)
        self._sizes.content = fragments.sizes(view)
        self._answers.content = fragments.answers(view, self._truth)
        self._parts.content = fragments.parts(view)
        times = {"encode": "chosen and encoded", "decode": "decoded", "answer": "answered"}
        self._times.content = ", ".join(
            f"{name} in {fragments.milliseconds(view.seconds[key])}" for key, name in times.items()
        )
        self._show_kept()

    @property
    def _truth(self) -> str:
        """The true answer, where an example's own question was asked."""
        example = None if self._example is None else examples()[self._example]
        known = example is not None and self._bench is not None and self._bench.question == example.question
        return example.truth if example is not None and known else ""

    def _show_kept(self) -> None:
        view, bench = self._view, self._bench
        if view is None or bench is None:
            return
        self._layer_name.content = ALL if self._layer is None else f"layer {self._layer + 1} of {view.layers}"
        self._by_layer.content = fragments.layers(view, self._layer)
        self._words.content = fragments.words(view, self._layer)
        images = list(self._shown.default_slot.children)
        if len(images) != len(bench.pictures):
            self._shown.clear()
            with self._shown:
                images = [ui.element("img").props('alt="what is kept"') for _ in bench.pictures]
            self._shown.style(f"--pictures: {len(images)}")
        self._shown.set_visibility(bool(images))
        for number, (element, picture) in enumerate(zip(images, bench.pictures, strict=True)):
            share = view.grid(number, self._layer)
            draw = {"kept": drawing.lit, "heat": drawing.heat}.get(str(self._look.value))
            pixels = drawing.plain(picture) if draw is None or share is None else draw(picture, share)
            element.props["src"] = drawing.data_uri(pixels)
            element.update()


def _panel(title: str) -> ui.element:
    panel = ui.element("section").classes("panel")
    with panel:
        ui.html(title, tag="h2")
    return panel


def _explanation(recipe: Recipe) -> str:
    """One sentence for each part that was chosen."""
    parts: list[object] = [recipe.selection, recipe.codec]
    if menus.takes_budget(Menus.of(recipe).scorer):
        parts[1:1] = [x for x in (recipe.budget, recipe.modality, recipe.merge) if x is not None]
    return "<br>".join(escape(menus.sentence(type(part))) for part in parts)
