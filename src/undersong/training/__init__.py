"""Training methods as parts for transformers' `Trainer`: collators, losses and mixins.

Names are imported when they are first used, because each needs torch and transformers.
"""

from .._lazy import lazy_names

__all__, __getattr__ = lazy_names(
    __name__,
    {
        "ditto": ("DittoLoss", "DittoTrainer", "DittoTrainerMixin"),
        "ditto_data": ("DittoDataCollator", "sentence_end_ids"),
        "full_rank_eval": ("FullRankEval", "full_ranks"),
        "mamba": (
            "MambaTrainer",
            "MambaTrainerMixin",
            "add_state_tuning",
            "allow_out_proj_adapters",
            "load_state_tuning",
            "save_state_tuning",
        ),
        "order_search": ("OrderSearchLoss", "OrderSearchTrainer", "OrderSearchTrainerMixin"),
        "recformer_data": ("DataCollatorForRecformerFinetuning", "DataCollatorForRecformerPretraining"),
        "recommend_run": ("recommend_run",),
        "recommendation_data": ("DataCollatorForCloze", "DataCollatorForNextItem"),
        "recommenders": (
            "TrainedRecommender",
            "build_recommender",
            "popularity_ranks",
            "sampled_ranks",
            "train_recommender",
        ),
        "router_stats": ("RouterStatsCallback", "plot_router_stats"),
        "segment_orders": ("RandomSegments", "SortedSegments"),
        "state_passing": ("StatePassingTrainer", "StatePassingTrainerMixin"),
        "streaming_documents": ("DocumentStreamSampler", "DocumentWindows", "StreamingDocumentCollator"),
        "two_stage": ("TwoStageCallback",),
        "state_spaces": ("StateSpaceTrainer", "StateSpaceTrainerMixin", "state_space_groups"),
    },
)
