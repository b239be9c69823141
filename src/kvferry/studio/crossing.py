"""The page's lower part: the same question sent over an emulated link, as a cache and as a picture."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from nicegui import run, ui

from kvferry.recipe import Recipe
from kvferry.studio import fragments
from kvferry.studio.bench import Bench
from kvferry.studio.live import Crossed, Shelf, cross, links

Asked = Callable[[], tuple[str, Bench, str]]
Guard = Callable[[Callable[[], Awaitable[None]]], Awaitable[bool]]
REFRESH_SECONDS = 0.1


class CrossingPanel:
    """Chooses a link, sends, and shows what it took.

    Parameters
    ----------
    asked : callable
        Gives the model's name, the prompt and the recipe that are on the page.
    guarded : callable
        Runs something whose failure becomes a sentence on the page.
    """

    def __init__(self, shelf: Shelf, asked: Asked, guarded: Guard) -> None:
        self._shelf = shelf
        self._asked = asked
        self._guarded = guarded
        self._acknowledged: tuple[int, int | None] = (0, None)
        with ui.element("section").classes("panel live"):
            with ui.element("div").classes("line"):
                ui.html("Live, over an emulated link", tag="h2")
                ui.element("div").classes("grow")
                self._link = ui.select(list(links()), value="10mbit", label="rate or trace").classes("link")
                self._link.props("dense outlined").style("min-width: 150px")
                self._rtt = ui.number("round trip, ms", value=20, min=0, max=2000).props("dense outlined")
                self._rtt.style("width: 120px").classes("rtt")
                self._button = ui.button("Send it", on_click=self._send).props("unelevated no-caps").classes("send")
            self._state = ui.html("A cloud starts as a second process when something is first sent.", tag="small")
            self._bar = ui.linear_progress(0, show_value=False).props("rounded instant-feedback")
            self._bar.set_visibility(False)
            self._result = ui.html("", sanitize=False)
        self._timer = ui.timer(REFRESH_SECONDS, self._progress, active=False)

    async def _send(self) -> None:
        self._button.disable()
        self._bar.set_visibility(True)
        self._timer.activate()
        try:
            await self._guarded(self._cross)
        finally:
            self._timer.deactivate()
            self._bar.set_visibility(False)
            self._button.enable()

    async def _cross(self) -> None:
        model, bench, recipe = self._asked()
        self._state.content = f"starting a cloud with {model}"
        try:
            cloud = await run.io_bound(self._shelf.cloud, model)
            rows: list[Crossed] = []
            for way in (recipe, None) if bench.pictures else (recipe,):
                if self._shelf.runs_first(cloud, Recipe.parse(way).codec.name if way else ""):
                    self._state.content = f"{way or 'the JPEG'} for the first time: what is loaded once does not count"
                    await run.io_bound(self._one, cloud, bench, way, None)
                self._state.content = f"sending {way or 'the JPEG'}"
                rows.append(await run.io_bound(self._one, cloud, bench, way, str(self._link.value)))
                self._result.content = fragments.crossings(rows)
            rtt = float(self._rtt.value or 0)
            self._state.content = (
                f"{self._link.value}, round trip {rtt:g} ms; every byte of the TCP stream counted. The edge and the "
                "cloud share this machine, so that both are as fast as it is."
            )
        except BaseException:
            self._state.content = "not sent"
            raise

    def _one(self, cloud: str, bench: Bench, recipe: str | None, link: str | None) -> Crossed:
        self._acknowledged = (0, None)
        return cross(
            bench.vlm, cloud, bench.pictures, bench.question, recipe, link=link,
            rtt_ms=float(self._rtt.value or 0) if link else 0.0, ship_first=bench.ship_first, on_sent=self._sent,
        )  # fmt: skip

    def _sent(self, acknowledged: int, total: int | None) -> None:
        self._acknowledged = (acknowledged, total)

    def _progress(self) -> None:
        acknowledged, total = self._acknowledged
        self._bar.value = acknowledged / total if total else 0
