"""Metrics as plain functions; most folders are also `evaluate` modules: `evaluate.load(".../metrics/repetition")`.

Names are imported when they are first used: some metrics run a model and need torch.
"""

from .._lazy import lazy_names

__all__, __getattr__ = lazy_names(
    __name__,
    {
        "code_repetition.measures": (
            "ccp",
            "code_repetition_scores",
            "egp",
            "rep_r",
            "rep_w",
            "sr_rate",
            "tr_n",
            "tr_s",
        ),
        "contains.measures": ("contains_score",),
        "diversity.measures": ("distinct_n", "diversity_mean", "diversity_product", "diversity_scores"),
        "epsilon_gap.measures": ("epsilon_gap_scores", "token_information"),
        "hull.measures": ("hull_scores", "is_simple", "polygon_area", "same_polygon"),
        "mauve": ("mauve_score",),
        "passkey.measures": ("passkey_scores", "t_recall"),
        "ranking.measures": ("rank_of", "ranking_scores"),
        "repetition.measures": ("rep_l", "rep_n", "rep_sen", "repetition_scores"),
        "sequence_order.measures": ("kendall_tau", "position_accuracy", "sequence_order_scores"),
        "set_match.measures": ("set_match_scores",),
        "self_reinforcement": ("plot_self_reinforcement",),
        "state_capacity": (
            "fit_recall_length",
            "fit_train_length",
            "measure_state_capacity",
            "plot_capacity",
            "plot_recall",
            "recommended_train_length",
            "state_size",
        ),
        "tour.measures": ("tour_length", "tour_scores"),
        "triangulation.measures": ("triangulation_scores",),
        "zipf.measures": ("zipf_fit", "zipf_scores"),
    },
)
