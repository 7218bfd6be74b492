"""Train a recommender of films on MovieLens-100k, and ask it what to watch next, by title.

    python examples/recommend_films.py            # about five minutes on 2 cores; downloads 2 MB
    python examples/recommend_films.py --fast

BERT4Rec (arXiv 1904.06690) reads the films somebody has rated, with a mask where the next one will be. Ids are those
of the data set: the vocabulary travels with the model, and titles are looked up at the end.
"""

import sys
import tempfile
import warnings

from undersong.data.movielens import movielens_100k
from undersong.metrics.ranking.measures import ranking_scores
from undersong.modeling.bert4rec.modeling_bert4rec import BertForSequentialRecommendation
from undersong.training.full_rank_eval import full_ranks
from undersong.training.recommenders import popularity_ranks, train_recommender

FAST = "--fast" in sys.argv
warnings.filterwarnings("ignore", "histories are cut")  # of a long history the model reads the most recent films
films = movielens_100k()
split = films.leave_one_out()
trained = train_recommender(
    split,
    films.vocab,
    "bert4rec",
    config={"max_position_embeddings": 20 if FAST else 50, "hidden_size": 16 if FAST else 64},
    max_epochs=2 if FAST else 150,
    epochs_per_evaluation=1 if FAST else 10,
    patience=5,
    device="cpu",
)
test = split.test
model_figures = ranking_scores(full_ranks(trained.model, test.histories, test.targets))
popular_figures = ranking_scores(popularity_ranks(split.train, test, films.num_items))
with tempfile.TemporaryDirectory() as folder:  # as another process would find it
    trained.model.save_pretrained(folder)
    model = BertForSequentialRecommendation.from_pretrained(folder)

by_title = {title: films.vocab.decode([row])[0] for row, title in films.titles.items()}
for liked in (["Star Wars", "Empire Strikes Back, The", "Alien"], ["Toy Story", "Aladdin", "Lion King, The"]):
    found = model.recommend([[by_title[title] for title in liked]], k=5)
    titles = [films.titles[row] for row in films.vocab.encode(found.item_ids[0])]
    print(f"{', '.join(liked)} -> {'; '.join(titles)}")
for name in ("hr@10/full/unseen", "ndcg@10/full/unseen"):
    print(f"{name}: {model_figures[name]:.4f}, popularity {popular_figures[name]:.4f}")
