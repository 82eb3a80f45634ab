"""aphroquant serve: a model behind an OpenAI-compatible HTTP API."""

from __future__ import annotations

import click

from aphroquant.cli.byte_amount import ByteAmount
from aphroquant.engine.types import EngineConfig
from aphroquant.server.logs import set_up_logging
from aphroquant.server.settings import LOG_LEVELS, ServerSettings


@click.command()
@click.argument("model", metavar="DIR")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=2242, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one.")
@click.option(
    "--api-key",
    "api_keys",
    multiple=True,
    envvar="APHROQUANT_API_KEY",
    metavar="KEY",
    help="Key that requests must carry; repeatable. Also from APHROQUANT_API_KEY, where `ps` does not show it.",
)
@click.option("--served-model-name", metavar="NAME", help="Name in the API.  [default: name of DIR]")
@click.option(
    "--kv-cache-dtype",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "float32", "bfloat16", "float16", "fp8_e4m3", "int8_per_token_head"]),
    help="Number format of the KV cache.",
)
@click.option("--kv-cache-memory", type=ByteAmount(), help="Size of the KV cache, such as 4GiB.  [default: a share]")
@click.option("--max-model-len", type=click.IntRange(1), help="Longest prompt and answer together, in tokens.")
@click.option("--max-num-seqs", default=64, show_default=True, type=click.IntRange(1), help="Answers at a time.")
@click.option(
    "--max-num-batched-tokens",
    type=click.IntRange(1),
    help="Tokens in one step.  [default: 512 on a CPU, 4096 on a GPU]",
)
@click.option(
    "--max-open",
    default=1024,
    show_default=True,
    type=click.IntRange(1),
    help="Answers that run or wait at a time; more get a 503.",
)
@click.option("--num-threads", type=click.IntRange(1), help="CPU threads.  [default: all cores]")
@click.option(
    "--device",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "cpu", "cuda"]),
    help="Where the model runs; auto is a GPU if one can be used.",
)
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "bfloat16", "float16"]),
    help="Activations on a GPU; auto is the model's own.",
)
@click.option(
    "--gpu-memory-utilization",
    default=0.9,
    show_default=True,
    type=click.FloatRange(0, 1, min_open=True),
    help="Share of the GPU's memory that may be used.",
)
@click.option("--backend", default="auto", show_default=True, help="Kernels: auto, reference, cpu or cuda.")
@click.option(
    "--activations",
    default="int8",
    show_default=True,
    type=click.Choice(["int8", "float"]),
    help="Inputs of integer-quantized layers: int8 is fast, float exact.",
)
@click.option("--no-prefix-caching", is_flag=True, help="Compute every prompt anew.")
@click.option("--log-level", default="info", show_default=True, type=click.Choice(LOG_LEVELS))
def command(
    model: str,
    host: str,
    port: int,
    api_keys: tuple[str, ...],
    served_model_name: str | None,
    kv_cache_dtype: str,
    kv_cache_memory: int | None,
    max_model_len: int | None,
    max_num_seqs: int,
    max_num_batched_tokens: int | None,
    max_open: int,
    num_threads: int | None,
    device: str,
    dtype: str,
    gpu_memory_utilization: float,
    backend: str,
    activations: str,
    no_prefix_caching: bool,
    log_level: str,
) -> None:
    """Serve the model in DIR (a checkpoint directory, GGUF file or Hub id) over an OpenAI-compatible HTTP API."""
    from aphroquant.server.serving import serve

    set_up_logging(log_level)
    config = EngineConfig(
        model=model,
        kv_cache_dtype=kv_cache_dtype,
        kv_cache_memory=kv_cache_memory,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        num_threads=num_threads,
        device=device,
        dtype=dtype,
        gpu_memory_utilization=gpu_memory_utilization,
        backend=backend,
        activations=activations,
        enable_prefix_caching=not no_prefix_caching,
    )
    settings = ServerSettings(
        host=host,
        port=port,
        api_keys=api_keys,
        served_model_name=served_model_name,
        max_open=max_open,
        log_level=log_level,
    )
    serve(config, settings, announce=click.echo)
