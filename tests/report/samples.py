"""Analyses and outcomes to draw: of the shape of real models, with the values a test needs to look for."""

from modegpt_graph.match.sites import Analysis, Certificate, ModelFacts, Role, Site, Unmatched
from modegpt_graph.report.outcome import CompressionOutcome, Ratios, Reduction, Search, SiteOutcome, Try
from modegpt_graph.rewrite.bounds import BoundPoint

BOTH = Certificate("both", 2.2e-16, True)
SEARCH = Search("max_perplexity_increase", 1.0, (Try(0.4, 0.9, 1.4), Try(0.3, 0.95, 0.9888)))


def mlp(layer: int, **changed) -> Site:
    values = {
        "id": f"layers.{layer}.gated-mlp",
        "pattern": "gated-mlp",
        "variant": "gate first",
        "type": "I",
        "paper_type": "I",
        "roles": {
            role: Role(f"model.layers.{layer}.mlp.{role}_proj.weight", ((0, 1536 if role != "down" else 576),))
            for role in ("gate", "up", "down")
        },
        "between": ("silu", "mul"),
        "nonlinearities": 1,
        "commutant": "columns",
        "block_size": 1,
        "certificate": Certificate("both", 2.2e-16 + layer * 1e-18, True),
        "decomposition": "nystrom",
        "reason": "every operation between works on single features, so any columns may be selected",
        "layer": layer,
        "groups": 1,
        "full_rank": 1536,
    }
    return Site(**(values | changed))


def query_key(layer: int, **changed) -> Site:
    values = {
        "id": f"layers.{layer}.query-key",
        "pattern": "query-key",
        "variant": "sdpa",
        "type": "II",
        "paper_type": "II",
        "roles": {
            "query": Role(f"model.layers.{layer}.self_attn.q_proj.weight", ((0, 576),)),
            "key": Role(f"model.layers.{layer}.self_attn.k_proj.weight", ((0, 192),)),
        },
        "between": ("rotary (half-split)", "rotary (half-split)", "softmax"),
        "nonlinearities": 2,
        "commutant": "blocks",
        "block_size": 2,
        "certificate": BOTH,
        "decomposition": "cr",
        "reason": "rotary embedding turns features in pairs (i, i + 32), so whole pairs are kept or dropped",
        "layer": layer,
        "groups": 3,
        "full_rank": 64,
    }
    return Site(**(values | changed))


def value_output(layer: int, **changed) -> Site:
    values = {
        "id": f"layers.{layer}.value-output",
        "pattern": "value-output",
        "variant": "sdpa",
        "type": "III",
        "paper_type": "III",
        "roles": {
            "value": Role(f"model.layers.{layer}.self_attn.v_proj.weight", ((0, 192),)),
            "output": Role(f"model.layers.{layer}.self_attn.o_proj.weight", ((0, 576),)),
        },
        "between": (),
        "nonlinearities": 0,
        "commutant": "linear",
        "block_size": 1,
        "certificate": Certificate("both", 1.1e-16, True),
        "decomposition": "svd",
        "reason": "nothing stands between value and output, so the optimal low-rank pair is allowed",
        "layer": layer,
        "groups": 3,
        "full_rank": 64,
    }
    return Site(**(values | changed))


def analysis(layers: int = 30, name: str = "demo", **changed) -> Analysis:
    sites = tuple(site(layer) for layer in range(layers) for site in (query_key, value_output, mlp))
    facts = ModelFacts(name, "LlamaForCausalLM", 134_515_008, 106_168_320)
    values = {"model": facts, "sites": sites, "unmatched": (), "coverage": 1.0}
    return Analysis(**(values | changed))


def normed(layers: int = 28) -> Analysis:
    """A model with a norm on queries and keys in some layers, a router that no pattern takes, and many experts."""
    refused = {
        "decomposition": None,
        "commutant": "none",
        "block_size": None,
        "between": ("rms_norm", "rotary (half-split)", "softmax"),
        "certificate": Certificate("both", 0.81, False),
        "reason": "rms_norm couples all 128 features of a head, so none can be taken out without changing the others",
        "full_rank": 128,
        "groups": 8,
    }
    sites = []
    for layer in range(layers):
        sites += [query_key(layer, **(refused if layer % 4 != 3 else {})), value_output(layer)]
        for expert in range(4):
            name = f"model.layers.{layer}.mlp.experts.{expert}"
            roles = {role: Role(f"{name}.{role}.weight", ((0, 768),)) for role in ("gate", "up", "down")}
            sites.append(mlp(layer, id=f"layers.{layer}.gated-mlp.{expert}", roles=roles, full_rank=768))
    unmatched = tuple(
        Unmatched(
            f"model.layers.{layer}.mlp.router.weight",
            "gated-mlp" if layer else None,
            f"after model.layers.{layer}.mlp.router expected an element-wise operation, found topk",
        )
        for layer in range(layers)
    )
    facts = ModelFacts("Qwen/Qwen3-30B-A3B", "Qwen3MoeForCausalLM", 30_532_122_624, 29_909_581_824)
    return Analysis(facts, tuple(sites), unmatched, 0.9994)


def outcome(of: Analysis, **changed) -> CompressionOutcome:
    sites = []
    for site in of.sites:
        if site.decomposition is not None:
            step = 2 if site.pattern == "query-key" else 1
            kept = 0.45 + 0.5 * ((site.layer or 0) % 30 / 30)
            rank = max(step, round(site.full_rank * kept) // step * step)
            error, after = (1 - kept) ** 2 / 4, int(2_654_208 * kept)
            sites.append(
                SiteOutcome(
                    site.id,
                    rank,
                    site.full_rank,
                    error,
                    2_654_208,
                    after,
                    bound=3 * error,
                    curve=(BoundPoint(site.full_rank // 2, 0.06, 0.3), BoundPoint(site.full_rank * 3 // 4, 0.01, 0.1)),
                )
            )
    values = {
        "ratio": 0.3,
        "allocator": "block-influence",
        "seed": 0,
        "calibration": "32 windows of 1,024 of wikitext2 (train)",
        "ratios": Ratios(0.3004, 0.3003, 0.2371),
        "parameters_before": 134_515_008,
        "parameters_after": 102_622_000,
        "sites": tuple(sites),
        "bytes_before": 538_060_032,
        "bytes_after": 410_488_000,
        "cache_bytes_per_token_before": 46_080,
        "cache_bytes_per_token_after": 33_120,
        "seconds": {"calibrate": 61.4, "decompose": 12.2, "rewrite": 3.1, "evaluate": 88.0},
        "forward_passes": 1.74,
        "perplexity_dense": 17.79,
        "perplexity_compressed": 35.38,
        "kl": 0.7123,
        "evaluation": "10 windows of 2,048 of wikitext2 (test)",
        "budget": "parameters",
        "reductions": {
            "parameters": Reduction(106_168_320, 74_317_824),
            "bytes": Reduction(538_060_032, 410_488_000),
            "multiply-adds": Reduction(205_228_800, 150_000_000),
            "kv-cache": Reduction(46_080, 33_120),
        },
        "context": 2048,
        "counted": "Multiply-adds are of one token.",
        "choices": ("Features of mlp are chosen by leverage.",),
        "reused": ("Statistics of the calibration text: from an earlier run, which took 61 s for it.",),
    }
    return CompressionOutcome(**(values | changed))
