"""The parts that the dashboards are made of: variables, rows, panels, and the selectors of their queries.

Every query selects by the variables ``$namespace`` and ``$job``. Both match everything when *All* is chosen, also
series without a namespace, as a Prometheus outside Kubernetes has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from grafana_foundation_sdk.builders import common as parts
from grafana_foundation_sdk.builders import dashboard as grafana
from grafana_foundation_sdk.builders import heatmap, prometheus, stat, timeseries
from grafana_foundation_sdk.models import common as part_models
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import heatmap as heatmap_models
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
JOB = 'namespace=~"$namespace",job_id=~"$job"'
NAMESPACE = 'namespace=~"$namespace"'
RATE = "[$__rate_interval]"
WIDTH = 24  # of a dashboard, in grid units

RED, ORANGE, GREEN = "red", "orange", "green"
Thresholds = Sequence[tuple[float | None, str]]


@dataclass(frozen=True, slots=True)
class Query:
    """One query of a panel, and the name of its series."""

    expr: str
    legend: str = "{{job_id}}"


def gauge(name: str, legend: str, extra: str = "") -> Query:
    """A gauge of the chosen jobs."""
    return Query(f"{name}{{{JOB}{extra}}}", legend)


Panel = timeseries.Panel | stat.Panel | heatmap.Panel


@dataclass(frozen=True, slots=True)
class Row:
    """Panels that answer one question."""

    question: str
    panels: Sequence[Panel]


def curves(
    title: str,
    description: str,
    *queries: Query,
    unit: str = "short",
    low: float | None = 0,
    high: float | None = None,
    thresholds: Thresholds = (),
    stacked: bool = False,
    logarithmic: bool = False,
    span: int = 8,
) -> timeseries.Panel:
    """Series over time."""
    panel = timeseries.Panel().title(title).description(description).datasource(SOURCE).unit(unit).span(span).height(8)
    panel = panel.line_width(1).fill_opacity(60 if stacked else 8).show_points(part_models.VisibilityMode.NEVER)
    legend = parts.VizLegendOptions().show_legend(True).display_mode(part_models.LegendDisplayMode.LIST)
    panel = panel.legend(legend.placement(part_models.LegendPlacement.BOTTOM))
    panel = panel.tooltip(parts.VizTooltipOptions().mode(part_models.TooltipDisplayMode.MULTI))
    if low is not None and not logarithmic:
        panel = panel.min(low)
    if high is not None:
        panel = panel.max(high)
    if stacked:
        panel = panel.stacking(parts.StackingConfig().mode(part_models.StackingMode.NORMAL))
    if logarithmic:
        scale = parts.ScaleDistributionConfig().type(part_models.ScaleDistribution.LOG).log(10)
        panel = panel.scale_distribution(scale)
    if thresholds:
        panel = panel.thresholds(_thresholds(thresholds))
        dashed = part_models.GraphThresholdsStyleMode.DASHED
        panel = panel.thresholds_style(parts.GraphThresholdsStyleConfig().mode(dashed))
    for index, query in enumerate(queries):
        panel = panel.with_target(_target(query, index))
    return panel


def figure(
    title: str,
    description: str,
    *queries: Query,
    unit: str = "short",
    decimals: float | None = None,
    thresholds: Thresholds = ((None, GREEN),),
    span: int = 4,
) -> stat.Panel:
    """The newest value, large, over a small curve."""
    panel = stat.Panel().title(title).description(description).datasource(SOURCE).unit(unit).span(span).height(4)
    panel = panel.thresholds(_thresholds(thresholds)).graph_mode(part_models.BigValueGraphMode.AREA)
    panel = panel.color_mode(part_models.BigValueColorMode.VALUE)
    panel = panel.reduce_options(parts.ReduceDataOptions().calcs(["lastNotNull"]))
    if decimals is not None:
        panel = panel.decimals(decimals)
    for index, query in enumerate(queries):
        panel = panel.with_target(_target(query, index))
    return panel


def distribution(title: str, description: str, metric: str, span: int = 8) -> heatmap.Panel:
    """How many of a histogram's values lie in each bucket, over time."""
    query = prometheus.Dataquery().expr(f"sum by (le) (rate({metric}_bucket{{{JOB}}}{RATE}))").legend_format("{{le}}")
    target = query.format(PromQueryFormat.HEATMAP).ref_id("A").range().datasource(SOURCE)
    panel = heatmap.Panel().title(title).description(description).datasource(SOURCE).span(span).height(8)
    colours = heatmap.HeatmapColorOptions().mode(heatmap_models.HeatmapColorMode.SCHEME).scheme("Oranges").steps(64)
    return panel.with_target(target).color(colours).calculate(False)


def dashboard(uid: str, title: str, description: str, rows: Sequence[Row], *, jobs: str) -> models.Dashboard:
    """A dashboard of rows.

    Args:
        uid: its identifier, by which links find it.
        title: its name.
        description: what it is for.
        rows: what it shows.
        jobs: ``one`` job at a time, or ``all`` unless some are chosen.
    """
    made = grafana.Dashboard(title).uid(uid).description(description).tags(["jackpot"]).refresh("30s").readonly()
    made = made.time("now-3h", "now").timezone("browser").tooltip(models.DashboardCursorSync.CROSSHAIR)
    made = made.with_variable(grafana.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    made = made.with_variable(_variable("namespace", "Namespace", "label_values(jackpot_build_info, namespace)"))
    job = _variable("job", "Job", f"label_values(jackpot_build_info{{{NAMESPACE}}}, job_id)", single=jobs == "one")
    made = made.with_variable(job)
    links = grafana.DashboardLink("Jackpot").type(models.DashboardLinkType.DASHBOARDS).tags(["jackpot"])
    made = made.link(links.as_dropdown(True).include_vars(True).keep_time(True))
    for row in rows:
        made = made.with_row(grafana.Row(row.question))
        for panel in row.panels:
            made = made.with_panel(panel)
    return made.build()


def _variable(name: str, label: str, query: str, *, single: bool = False) -> grafana.QueryVariable:
    variable = grafana.QueryVariable(name).label(label).query(query).datasource(SOURCE)
    variable = variable.refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED).sort(models.VariableSort.ALPHABETICAL_ASC)
    if single:
        return variable.multi(False).include_all(False)
    everything = models.VariableOption(selected=True, text="All", value="$__all")
    return variable.multi(True).include_all(True).all_value(".*").current(everything)


def _thresholds(steps: Thresholds) -> grafana.ThresholdsConfig:
    made = [models.Threshold(value=value, color=colour) for value, colour in steps]
    return grafana.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(made)


def _target(query: Query, index: int) -> prometheus.Dataquery:
    target = prometheus.Dataquery().expr(query.expr).legend_format(query.legend).ref_id(chr(ord("A") + index))
    return target.range().datasource(SOURCE)
