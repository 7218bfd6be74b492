"""A demo result made by hand, with the awkward cases: long words, quotes, markup in a text, an empty continuation."""

TEXT = "the sea and the sky and the sea and the sky and the sea"
LONG = "Donaudampfschifffahrtsgesellschaftskapitänsmützenabzeichen" * 3

RESULT = {
    "decode": {
        "model": "SmolLM2-135M-Instruct",
        "prompts": ["The old clockmaker said: \"<b>tick</b>\" &", "A second prompt"],
        "max_new_tokens": 40,
        "methods": {
            name: {
                "description": f"about {name}",
                "texts": [text, second],
                "metrics": {"rep_1": 0.5, "rep_2": 0.4, "rep_3": 0.3, "rep_4": rep_4, "rep_l_32": 0.5, "rep_l": 0.5},
                "repeated_sentences": rep_4 / 2,
                "tokens_per_s": speed,
            }
            for name, text, second, rep_4, speed in (
                ("greedy", TEXT, LONG, 0.625, 31.0),
                ("typical sampling", "<script>alert('no')</script> & so on", "", 0.0, 29.5),
                ("repetition cap", "a\n\nb", "c", 0.125, 30.5),
            )
        },
    },
    "train": {
        "data": {"train": 1077, "validation": 360, "test": 360},
        "models": {
            kind: {
                "learning_rate": 3e-3,
                "seed": 0,
                "epochs": 3,
                "parameters": 105_098,
                "seconds": 12.3,
                "validation": 0.9611,
                "test": test,
                "history": [{"epoch": i, "validation": 0.3 * i, "loss": 2.0 / i} for i in (1, 2, 3)],
            }
            for kind, test in (("aaren", 0.9583), ("transformer", 0.9639))
        },
        "example": {
            "values": [(i % 8) / 8 for i in range(64)],
            "label": 7,
            "probabilities": [0.01] * 7 + [0.9, 0.02, 0.01],
        },
    },
    "hub": {
        "repo": "undersong/aaren-digits",
        "files": {"README.md": 2588, "config.json": 1232, "ops_cumulative_softmax_average_with_a_long_name.py": 16038},
        "commit": "41afc11e",
        "loaded_class": "AarenForTimeSeriesClassification",
        "loaded_module": "transformers_modules.undersong.aaren_hyphen_digits.modeling_aaren",
        "series": 360,
        "bit_equal": True,
        "largest_difference": 0.0,
        "seconds": 8.4,
    },
    "seconds": {"decode": 30.0, "train": 40.0, "hub": 8.4},
    "about": {
        "fast": True,
        "date": "2026-11-24",
        "cpu": "AMD EPYC 9R14 96-Core Processor",
        "cores": 2,
        "threads": 2,
        "python": "3.11.7",
        "versions": {"undersong": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.22.2"},
        "seconds": 80.0,
    },
}  # fmt: skip
