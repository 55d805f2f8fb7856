"""The processes: are they up, do they answer, what do they use?"""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from dashboards.panels import GREEN, JOB, NAMESPACE, ORANGE, RATE, RED, Query, Row, curves, dashboard, figure

INSTANCE = "{{job_id}} {{instance}}"
CALL = "{{grpc_service}}/{{grpc_method}}"
ERRORS = ((None, GREEN), (0.01, ORANGE), (0.05, RED))


def quantile(fraction: str, metric: str, by: str) -> str:
    """A quantile of a histogram, by labels; without those that saw nothing, whose quantile is no number."""
    return f"histogram_quantile({fraction}, sum by (le, {by}) (rate({metric}_bucket{{{JOB}}}{RATE}))) >= 0"


UP = Row(
    "Are they up?",
    (
        figure(
            "Processes that answer",
            "Of those that Prometheus knows.",
            Query(f"sum(up{{{JOB}}})", "up"),
            Query(f"count(up{{{JOB}}})", "known"),
            span=6,
        ),
        figure(
            "Versions",
            "Processes by version of Jackpot; more than one is an update half-way.",
            Query(f"count by (version) (jackpot_build_info{{{JOB}}})", "{{version}}"),
            span=6,
        ),
        figure(
            "Restarts in the last hour",
            "Of processes under the same name.",
            Query(f"sum(changes(process_start_time_seconds{{{JOB}}}[1h]))", "restarts"),
            thresholds=((None, GREEN), (1, ORANGE)),
            span=6,
        ),
        figure(
            "Rollout replicas ready",
            "Of those wanted.",
            Query(
                f'sum(jackpot_rollout_replicas{{{JOB},state="ready"}}) / '
                f'sum(jackpot_rollout_replicas{{{JOB},state="wanted"}})',
                "ready",
            ),
            unit="percentunit",
            thresholds=((None, RED), (1, GREEN)),
            span=6,
        ),
        curves("CPU", "Cores in use.", Query(f"rate(process_cpu_seconds_total{{{JOB}}}{RATE})", INSTANCE)),
        curves("Memory", "Resident.", Query(f"process_resident_memory_bytes{{{JOB}}}", INSTANCE), unit="bytes"),
        curves(
            "File descriptors",
            "Open, of those allowed.",
            Query(f"process_open_fds{{{JOB}}} / process_max_fds{{{JOB}}}", INSTANCE),
            unit="percentunit",
        ),
    ),
)

RPC = Row(
    "Do they answer? (RPC)",
    (
        curves(
            "Requests per second",
            "By method.",
            Query(f"sum by (grpc_service, grpc_method) (rate(jackpot_rpc_requests_total{{{JOB}}}{RATE}))", CALL),
        ),
        curves(
            "Errors",
            "Share of answers other than OK, by code. RESOURCE_EXHAUSTED is a full queue: the group goes elsewhere.",
            Query(
                f'sum by (grpc_code) (rate(jackpot_rpc_requests_total{{{JOB},grpc_code!="OK"}}{RATE}))'
                f" / on () group_left () sum(rate(jackpot_rpc_requests_total{{{JOB}}}{RATE}))"
                f" or 0 * sum(rate(jackpot_rpc_requests_total{{{JOB}}}{RATE}))",
                "{{grpc_code}}",
            ),
            unit="percentunit",
            thresholds=ERRORS,
        ),
        curves(
            "Duration",
            "Median and 99th percentile of the time to answer.",
            Query(quantile("0.5", "jackpot_rpc_duration_seconds", "grpc_service, grpc_method"), f"{CALL} p50"),
            Query(quantile("0.99", "jackpot_rpc_duration_seconds", "grpc_service, grpc_method"), f"{CALL} p99"),
            unit="s",
        ),
        curves(
            "In flight",
            "Calls being answered.",
            Query(f"sum by (instance) (jackpot_rpc_in_flight{{{JOB}}})", "{{instance}}"),
        ),
    ),
)

WEIGHTS = Row(
    "Do they follow the weights?",
    (
        curves(
            "Weight version held",
            "By replica, and the newest published.",
            Query(f"jackpot_weight_version{{{JOB}}}", "{{job_id}} {{instance}} {{role}}"),
            Query(f"jackpot_newest_weight_version{{{JOB}}}", "{{job_id}} newest {{role}}"),
        ),
        curves(
            "Time to load a version",
            "Mean, by service: reading, verifying and swapping in.",
            Query(
                f"sum by (service, role) (rate(jackpot_weight_load_seconds_sum{{{JOB}}}{RATE}))"
                f" / (sum by (service, role) (rate(jackpot_weight_load_seconds_count{{{JOB}}}{RATE})) > 0)",
                "{{service}} {{role}}",
            ),
            unit="s",
        ),
        curves(
            "Versions refused",
            "Damaged, or of another shape.",
            Query(
                f"sum by (instance) (increase(jackpot_weights_refused_total{{{JOB}}}{RATE})) or "
                f"0 * sum by (instance) (jackpot_weight_version{{{JOB}}})",
                "{{instance}}",
            ),
            thresholds=((None, GREEN), (1, RED)),
        ),
        curves(
            "Calls to the object store that failed",
            "Refused or out of reach, by replica; tried again for a while. Zero without `weights.store`.",
            Query(
                f'sum by (instance) (increase(jackpot_object_store_calls_total{{{JOB}, result="failed"}}{RATE})) or '
                f"0 * sum by (instance) (jackpot_weight_version{{{JOB}}})",
                "{{instance}}",
            ),
            thresholds=((None, GREEN), (1, RED)),
        ),
    ),
)

GPU = Row(
    "Are the GPUs busy?",
    (
        curves(
            "Busy fraction",
            "Share of time in which a kernel runs, as NVML sees it.",
            Query(f"jackpot_gpu_busy_ratio{{{JOB}}}", "{{instance}} {{gpu}}"),
            unit="percentunit",
            high=1,
            span=12,
        ),
        curves(
            "Memory",
            "In use, of what there is.",
            Query(
                f"jackpot_gpu_memory_used_bytes{{{JOB}}} / jackpot_gpu_memory_size_bytes{{{JOB}}}",
                "{{instance}} {{gpu}}",
            ),
            unit="percentunit",
            high=1,
            span=12,
        ),
    ),
)

VLLM = Row(
    "Is vLLM well used?",
    (
        curves(
            "Requests",
            "Running and waiting. Many waiting: the KV cache or max_num_seqs is the limit.",
            Query(f"sum by (instance) (vllm:num_requests_running{{{JOB}}})", "{{instance}} running"),
            Query(f"sum by (instance) (vllm:num_requests_waiting{{{JOB}}})", "{{instance}} waiting"),
        ),
        curves(
            "KV cache in use",
            "At 1, requests are preempted.",
            Query(f"max by (instance) (vllm:kv_cache_usage_perc{{{JOB}}})", "{{instance}}"),
            unit="percentunit",
            high=1,
        ),
        curves(
            "Tokens per second",
            "Prompt and generated.",
            Query(f"sum by (instance) (rate(vllm:prompt_tokens_total{{{JOB}}}{RATE}))", "{{instance}} prompt"),
            Query(f"sum by (instance) (rate(vllm:generation_tokens_total{{{JOB}}}{RATE}))", "{{instance}} generated"),
        ),
        curves(
            "Prefix cache hits",
            "Share of prompt tokens found: a group's siblings share their prompt.",
            Query(
                f"sum by (instance) (rate(vllm:prefix_cache_hits_total{{{JOB}}}{RATE}))"
                f" / (sum by (instance) (rate(vllm:prefix_cache_queries_total{{{JOB}}}{RATE})) > 0)",
                "{{instance}}",
            ),
            unit="percentunit",
            high=1,
        ),
        curves(
            "Preemptions per second",
            "Requests thrown out of the KV cache and computed again.",
            Query(f"sum by (instance) (rate(vllm:num_preemptions_total{{{JOB}}}{RATE}))", "{{instance}}"),
        ),
        curves(
            "Time per token",
            "99th percentile of the time between two tokens.",
            Query(quantile("0.99", "vllm:inter_token_latency_seconds", "instance"), "{{instance}}"),
            unit="s",
        ),
    ),
)

REST = Row(
    "Does the control plane answer? (REST)",
    (
        curves(
            "Requests per second",
            "By route.",
            Query(
                f"sum by (method, route) (rate(jackpot_api_requests_total{{{NAMESPACE}}}{RATE}))",
                "{{method}} {{route}}",
            ),
        ),
        curves(
            "Server errors",
            "Share of answers of status 500 and above.",
            Query(
                f'(sum(rate(jackpot_api_requests_total{{{NAMESPACE},status=~"5.."}}{RATE})) or vector(0))'
                f" / sum(rate(jackpot_api_requests_total{{{NAMESPACE}}}{RATE}))",
                "errors",
            ),
            unit="percentunit",
            thresholds=ERRORS,
        ),
        curves(
            "Duration",
            "99th percentile by route, to the last byte. Streams of events and logs last as long as they are read.",
            Query(
                "histogram_quantile(0.99, sum by (le, route) "
                f"(rate(jackpot_api_request_duration_seconds_bucket{{{NAMESPACE}}}{RATE}))) >= 0",
                "{{route}}",
            ),
            unit="s",
        ),
        curves(
            "In flight",
            "Requests being answered, streams among them.",
            Query(f"sum(jackpot_api_requests_in_flight{{{NAMESPACE}}})", "requests"),
            Query(f"sum(jackpot_api_open_streams{{{NAMESPACE}}})", "streams"),
        ),
    ),
)


def services_dashboard() -> Dashboard:
    """The dashboard of the processes."""
    description = "The processes of the jobs and the control plane: health, RPC, weights, GPUs, vLLM, REST."
    rows = (UP, RPC, WEIGHTS, GPU, VLLM, REST)
    return dashboard("jackpot-services", "Jackpot / Services", description, rows, jobs="all")
