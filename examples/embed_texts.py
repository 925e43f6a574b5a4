"""Search a list of texts with EmbeddingGemma: prints them, the nearest to the question first.

    python examples/embed_texts.py google/embeddinggemma-300m "Which planet is red?" \
        "Mars is red." "Cats sleep a lot." "Saturn has rings."
"""

import argparse

from gemma_keras import GemmaTextEmbedder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a folder of sentence-transformers, or a name on the Hub")
    parser.add_argument("question")
    parser.add_argument("texts", nargs="+")
    arguments = parser.parse_args()

    embedder = GemmaTextEmbedder.from_preset(arguments.model)
    question = embedder.encode(arguments.question, prompt_name="query")
    texts = embedder.encode(arguments.texts, prompt_name="document")

    cosines = (texts @ question.reshape(-1)).tolist()
    for cosine, text in sorted(zip(cosines, arguments.texts, strict=True), reverse=True):
        print(f"{cosine:.3f}  {text}")


if __name__ == "__main__":
    main()
