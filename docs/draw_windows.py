"""Draw what each kind of window makes of some messages: docs/windows/*.svg, which guide.rst shows.

The windows and the moments at which they are emitted come from `minibatch.testing.run`, so what is drawn is what
happens. Run it after a change: python docs/draw_windows.py
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from minibatch import MessageWindow
from minibatch.testing import ManualClock, Run, run

HERE = Path(__file__).parent / 'windows'
START = datetime(2026, 1, 1, 12, tzinfo=timezone.utc)

# Pixels. A second of the axis is SECOND wide, and the names of the rows stand left of LEFT.
LEFT = 96
SECOND = 10
ROW = 28
WIDTH = 800

# The panel brings its own background, so that the text can be read on any page, light or dark.
STYLE = """
  .panel { fill: #ffffff; stroke: #d0d7de }
  .axis { stroke: #8c959f } .grid { stroke: #d8dee4 } .mark { stroke: #57606a; stroke-dasharray: 2 3 }
  text { font: 13px system-ui, sans-serif; fill: #1f2328 } .small { font-size: 11px; fill: #57606a }
  .k0 { fill: #b6d7f7; stroke: #0969da } .k1 { fill: #ffd8a8; stroke: #bc4c00 }
  .empty, .open { fill: none; stroke: #57606a; stroke-dasharray: 4 3 } .late { fill: none; stroke: #cf222e }
  .emitted { fill: #57606a } .band { fill-opacity: .45 } .red { fill: #cf222e }
  @media (prefers-color-scheme: dark) {
    .panel { fill: #161b22; stroke: #3d444d }
    .axis { stroke: #8b949e } .grid { stroke: #30363d } .mark { stroke: #9da7b3 }
    text { fill: #e6edf3 } .small { fill: #9da7b3 }
    .k0 { fill: #1f4b7a; stroke: #58a6ff } .k1 { fill: #6b3d10; stroke: #f0883e }
    .empty, .open { stroke: #9da7b3 } .late { stroke: #ff7b72 } .emitted { fill: #9da7b3 } .red { fill: #ff7b72 }
  }
"""


@dataclass
class Bar:
    """A window: its messages by name, from and to when it reaches, and when it was emitted, in seconds."""

    window: MessageWindow
    names: str
    start: float
    end: float
    emitted: float


@dataclass
class Kind:
    """A picture: the seconds at which messages come, and the options of the windows.

    With `keys`, one letter for each message, they have a field ``room``; with `times` a field ``at``, in seconds.
    """

    title: str
    seconds: list[float]
    options: dict[str, Any]
    until: int = 65
    keys: str = ''
    times: list[float] | None = None

    def messages(self) -> list[tuple[datetime, dict[str, Any]]]:
        """What is appended, and when; the n-th message is named by the n-th letter."""
        messages = []
        for i, second in enumerate(self.seconds):
            data: dict[str, Any] = {'name': chr(ord('a') + i)}
            if self.keys:
                data['room'] = self.keys[i]
            if self.times:
                data['at'] = START.timestamp() + self.times[i]
            messages.append((moment(second), data))
        return messages


SECONDS = [2, 5, 9, 14, 17, 22, 41, 44]
KINDS = {
    'size': Kind('size=3', SECONDS, {'size': 3}),
    'max_wait': Kind('size=3, max_wait=10', SECONDS, {'size': 3, 'max_wait': 10}),
    'interval': Kind('interval=10', SECONDS, {'interval': 10}),
    'fixed': Kind('interval=10, relaxed=False', SECONDS, {'interval': 10, 'relaxed': False}),
    'slide': Kind('interval=20, slide=10', [11, 14, 18, 23, 26, 35, 41], {'interval': 20, 'slide': 10}),
    'gap': Kind('gap=10', SECONDS, {'gap': 10}),
    'key': Kind("interval=20, relaxed=False, key='room'", SECONDS,
                {'interval': 20, 'relaxed': False, 'key': 'room'}, keys='ABAABBBA'),
    'timestamp': Kind("interval=10, timestamp='at', lateness=5", [4, 10, 16, 20, 24, 29, 33, 37],
                      {'interval': 10, 'timestamp': 'at', 'lateness': 5}, times=[3, 8, 12, 6, 17, 7, 22, 26]),
}  # fmt: skip


def moment(second: float) -> datetime:
    """A second of the axis as a time."""
    return datetime.fromtimestamp(START.timestamp() + second, timezone.utc)


def second_of(time: datetime) -> float:
    """A time as a second of the axis."""
    return (time - START).total_seconds()


def x_of(second: float) -> float:
    """Where a second is."""
    return LEFT + SECOND * second


def windows_of(kind: Kind) -> tuple[list[Bar], Run]:
    """The windows of a picture, as minibatch makes them."""
    clock = ManualClock(START)
    made = run(lambda window: second_of(clock.now()), kind.messages(), clock=clock, **kind.options)
    bars = []
    for window, emitted in made:
        arrived = [second_of(message.created) for message in window.messages]
        start = second_of(window.start) if window.start else arrived[0] - 0.8
        end = second_of(window.end) if window.end else arrived[-1] + 0.8
        bars.append(Bar(window, ' '.join(data['name'] for data in window.data), start, end, emitted))
    return bars, made


def lanes(bars: list[Bar]) -> list[int]:
    """For each window the row it is drawn in: that of its key, or one where it covers no other and no mark."""
    if any(bar.window.key for bar in bars):
        keys = sorted({bar.window.key for bar in bars})
        return [keys.index(bar.window.key) for bar in bars]

    rows: list[float] = []
    chosen = []
    for bar in bars:
        row = next((i for i, end in enumerate(rows) if end <= bar.start), len(rows))
        rows[row:row + 1] = [max(bar.end, bar.emitted)]
        chosen.append(row)
    return chosen


def colour(key: Any, keys: str) -> str:
    """The class of a message or window with a key."""
    return f'k{sorted(set(keys)).index(key)}' if keys else 'k0'


def text(x: float, y: float, words: str, style: str = '', anchor: str = 'middle') -> str:
    """Words, which need no escaping."""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" class="{style}">{words}</text>'


def line(x: float, y: float, x2: float, y2: float, style: str) -> str:
    """A straight line."""
    return f'<line x1="{x:g}" y1="{y:g}" x2="{x2:g}" y2="{y2:g}" class="{style}"/>'


def box(x: float, y: float, width: float, height: float, style: str) -> str:
    """A rectangle with round corners."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5" class="{style}"/>'


def dot(x: float, y: float, name: str, style: str) -> list[str]:
    """A message."""
    return [f'<circle cx="{x:g}" cy="{y:g}" r="9" class="{style}"/>', text(x, y + 4, name)]


def bar_of(bar: Bar, y: float, style: str) -> list[str]:
    """A window, and a mark of when it is emitted."""
    start, end, emitted = x_of(bar.start), x_of(bar.end), x_of(bar.emitted)
    drawn = [box(start, y, end - start, 20, style if bar.names else 'empty'),
             text((start + end) / 2, y + 14, bar.names or 'no messages', '' if bar.names else 'small')]  # fmt: skip
    if emitted > end + 2:
        drawn.append(line(end, y + 10, emitted, y + 10, 'mark'))
    return [*drawn, f'<path d="M{emitted - 5:g} {y - 5:g}h10l-5 8z" class="emitted"/>']


def axis(until: int, y: float, bottom: float) -> list[str]:
    """The seconds, and a line down from every tenth."""
    drawn = []
    for second in range(0, until + 1, 10):
        x = x_of(second)
        drawn += [line(x, y, x, bottom, 'grid'), text(x, y - 6, f'{second} s', 'small')]
    return [*drawn, line(x_of(0), y, x_of(until), y, 'axis')]


def timeline(kind: Kind) -> tuple[list[str], float]:
    """Messages above and windows below, by the time at which they are appended."""
    bars, _ = windows_of(kind)
    rows = lanes(bars)
    first = 112
    bottom = first + ROW * (max(rows) + 1)

    drawn = [*axis(kind.until, 52, bottom), text(LEFT - 14, 80, 'messages', 'small', 'end')]
    for i, second in enumerate(kind.seconds):
        drawn += dot(x_of(second), 76, chr(ord('a') + i), colour(kind.keys[i:i + 1], kind.keys))
    drawn.append(text(LEFT - 14, first + 14, 'windows', 'small', 'end'))

    for bar, row in zip(bars, rows, strict=True):
        drawn += bar_of(bar, first + ROW * row, colour(bar.window.key, kind.keys))
    return [*drawn, *legend(bottom + 16, kind.keys)], bottom + 30


def legend(y: float, keys: str) -> list[str]:
    """What the marks mean."""
    drawn = [f'<path d="M{LEFT} {y - 6:g}h10l-5 8z" class="emitted"/>',
             text(LEFT + 16, y + 2, 'emitted', 'small', 'start')]  # fmt: skip
    for i, key in enumerate(sorted(set(keys))):
        drawn += [f'<circle cx="{LEFT + 90 + 80 * i}" cy="{y - 2:g}" r="6" class="k{i}"/>',
                  text(LEFT + 102 + 80 * i, y + 2, f'room {key}', 'small', 'start')]  # fmt: skip
    return drawn


def event_time(kind: Kind) -> tuple[list[str], float]:
    """Messages by the time that is in them, from left to right, and by when they are appended, downwards."""
    bars, made = windows_of(kind)
    top, scale = 60, 7
    bottom = top + scale * 42
    late = {message.data['name'] for message in made.late}

    drawn = [*axis(40, top, bottom), text(x_of(42), top - 6, 'time in the message', 'small', 'start')]
    for second in range(0, 41, 10):
        drawn.append(text(LEFT - 14, top + scale * second + 4, f'{second} s', 'small', 'end'))
    drawn.append(text(LEFT - 14, bottom + 14, 'appended at', 'small', 'end'))

    for bar in bars:
        drawn += band(bar, top, scale, bottom)
    for i, (second, time) in enumerate(zip(kind.seconds, kind.times or [], strict=True)):
        name = chr(ord('a') + i)
        y = top + scale * second
        drawn += dot(x_of(time), y, name, 'late' if name in late else 'k0')
        if name in late:
            drawn.append(text(x_of(time) - 14, y + 4, 'late', 'red', 'end'))
    return drawn, bottom + 24


def band(bar: Bar, top: float, scale: float, bottom: float) -> list[str]:
    """A window from its first message to when it is emitted; what the end of the input emits is still open."""
    start, end = x_of(bar.start), x_of(bar.end)
    begin = top + scale * min(second_of(message.created) for message in bar.window.messages) - 13
    watermark = bar.window.watermark
    if watermark is None or bar.window.end is None or watermark < bar.window.end:
        return [box(start + 2, begin, end - start - 4, bottom - begin, 'open'),
                text((start + end) / 2, bottom - 6, 'open', 'small')]  # fmt: skip
    closed = top + scale * bar.emitted
    words = f'{bar.names}: emitted at {bar.emitted:g} s, when the watermark is {second_of(watermark):g} s'
    return [box(start + 2, begin, end - start - 4, closed - begin, 'k0 band'),
            line(start, closed, x_of(41), closed, 'mark'),
            text(x_of(41) + 4, closed + 4, words, 'small', 'start')]  # fmt: skip


def picture(kind: Kind) -> str:
    """The SVG of a kind of window."""
    drawn, height = (event_time if kind.times else timeline)(kind)
    title = f'<text x="16" y="24" text-anchor="start" style="font-family: monospace">{kind.title}</text>'
    panel = f'<rect x=".5" y=".5" width="{WIDTH - 1}" height="{height - 1:g}" rx="8" class="panel"/>'
    size = f'viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}"'
    head = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">', f'<title>{kind.title}</title>']
    return '\n'.join([*head, f'<style>{STYLE}</style>', panel, title, *drawn, '</svg>', ''])


def main() -> None:
    """Write all pictures."""
    HERE.mkdir(exist_ok=True)
    for name, kind in KINDS.items():
        (HERE / f'{name}.svg').write_text(picture(kind), encoding='utf-8')


if __name__ == '__main__':
    main()
