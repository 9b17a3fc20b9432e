"""Training in float64, for tests of sums in another order, also in processes of their own."""
import train
from integrate import AudioLLM


def in_float64(setattr=setattr):
    """Have train.py train in float64. Then sums in another order stay equal to 1e-6 for as long as
    it lasts; in float32 rounding turns the signs of tiny gradients, and Adam's steps with them."""
    load, encode = train.load_base, AudioLLM.encode

    def loaded(*args):
        model = load(*args)
        model.llm.double(), model.connectors.double()
        return model

    def encoded(model, spectrograms):
        return [{kind: x.double() for kind, x in clip.items()}
                for clip in encode(model, spectrograms)]

    setattr(train, "load_base", loaded)
    setattr(AudioLLM, "encode", encoded)
