"""The chart of results.json: what each case reaches as a multiple of its floor, or of its target."""

import matplotlib
from common import number_text, ratio_text

matplotlib.use('Agg')
from matplotlib import pyplot

WIDTH, DPI = 9.0, 100  # inches, dots an inch: 900 pixels wide
LEFT, RIGHT = 2.5, 1.9  # inches beside the bars
TOP, TITLE, BAR, AXIS = 0.55, 0.32, 0.19, 0.3  # inches
COLORS = {'more': '#2a6f97', 'less': '#bc6c25'}
TICKS = (0.001, 0.01, 0.1, 0.25, 0.5, 1, 2, 5, 10, 100)


def draw(results, path):
    """Write the chart: a panel for each benchmark, a bar for each figure that is compared, from 1 to its ratio."""
    panels = [(name, benchmark, compared(benchmark)) for name, benchmark in results['benchmarks'].items()]
    panels = [(name, benchmark, rows) for name, benchmark, rows in panels if rows]
    height = TOP + sum(TITLE + len(rows) * BAR + AXIS for _, _, rows in panels)
    figure = pyplot.figure(figsize=(WIDTH, height))
    head(figure, results['machine'], height)
    y = height - TOP
    for name, benchmark, rows in panels:
        y -= TITLE
        title = f'{name}: {benchmark["title"]} {benchmark["better"].capitalize()} is better.'
        figure.text(0.01, (y + 0.08) / height, title, fontsize=8.5, weight='bold')
        y -= len(rows) * BAR
        place = LEFT / WIDTH, y / height, 1 - (LEFT + RIGHT) / WIDTH, len(rows) * BAR / height
        bars(figure.add_axes(place), rows, COLORS[benchmark['better']])
        y -= AXIS
    figure.savefig(path, dpi=DPI)
    pyplot.close(figure)


def compared(benchmark):
    """The rows for the chart; of a case with several rates the first."""
    return [row for row in benchmark['rows'] if row['ratio'] is not None and 'steady' not in row['figure']]


def head(figure, machine, height):
    what = 'Bars: figure by floor (the same by hand, or a target). Beside them: figure : floor = ratio.'
    where = (
        f'{machine["cores"]} cores, Python {machine["python"]}, MongoDB {machine["mongodb"]}, '
        f'w: {machine["write concern"]}, {machine["date"]}; medians of {machine["repeats"]}, a {machine["size"]} run'
    )
    figure.text(0.01, 1 - 0.22 / height, what, fontsize=9)
    figure.text(0.01, 1 - 0.42 / height, where, fontsize=8, color='#555555')


def bars(panel, rows, color):
    ratios = [row['ratio'] for row in rows]
    low, high = min([0.5, *ratios]) / 1.2, max([2.0, *ratios]) * 1.2
    panel.set_xscale('log')
    panel.set_xlim(low, high)
    shown = [tick for tick in TICKS if low <= tick <= high]
    panel.set_xticks(shown, [f'{tick:g}' for tick in shown], fontsize=7)
    panel.minorticks_off()
    panel.barh(range(len(rows)), [ratio - 1 for ratio in ratios], left=1, height=0.7, color=color)
    panel.axvline(1, color='black', linewidth=0.8)
    panel.set_ylim(len(rows) - 0.4, -0.6)
    panel.set_yticks(range(len(rows)), [label(row) for row in rows], fontsize=7.5)
    panel.tick_params(left=False)
    panel.spines[['top', 'left', 'right']].set_visible(False)
    for place, row in enumerate(rows):
        text = f'{number_text(row["value"])} : {number_text(row["floor"])} = {ratio_text(row["ratio"])}'
        panel.annotate(text, (1, place), (6, 0), ('axes fraction', 'data'), 'offset points', fontsize=7.5, va='center',
                       annotation_clip=False)  # fmt: skip


def label(row):
    """The case, and its figure, unless that is the usual one."""
    return row['case'] if row['figure'] == 'messages/s' else f'{row["case"]}: {row["figure"]}'
