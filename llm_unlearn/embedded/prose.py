"""Short plain paragraphs that no recipe trains on: held text on which the general ability of a pretrained model is measured."""

from __future__ import annotations

PARAGRAPHS = (
    "Bread rises because yeast eats the sugar in the dough and gives off a gas. The gas is caught in thousands of small "
    "bubbles, and the dough grows around them. In the oven the bubbles swell once more, the crust dries and turns brown, "
    "and the loaf keeps the shape that it had when the yeast died. A dough that is left too long falls in, since its walls "
    "have grown too thin to hold.",
    "A river is never the same width for long. On the outer side of a bend the water runs faster and takes earth from the "
    "bank; on the inner side it slows down and drops what it carries. So the bend moves outward, year after year, until the "
    "river breaks through the narrow neck of land and leaves the old bend behind as a quiet lake in the shape of a bow.",
    "The first clocks had no hands. They struck a bell so that the people of a town knew when to pray, to open the market "
    "and to close the gates. An hour was long in summer and short in winter, as the day was divided into twelve parts "
    "whatever its length. Only when trains had to meet at a junction did every town need the same minute.",
    "Most birds that fly far in autumn travel at night. The air is cooler and calmer then, hawks are asleep, and the stars "
    "show the way. By day the birds rest and feed in hedges and on shores. A small warbler may double its weight before it "
    "sets out, and crosses the sea in one flight that lasts for two or three days.",
    "To learn a language it helps to read what one would like to read anyway. A story pulls the reader over the words that "
    "are not known, and a word that is met in ten places explains itself. Lists of words are soon learned and as soon "
    "forgotten. Speaking is another matter: it asks for somebody who listens, and for the courage to make mistakes.",
    "Snow is quiet because it is mostly air. Between the branches of the crystals lie pockets in which sound loses its way, "
    "much as it does in a heavy curtain. When the snow has been walked on, or has thawed and frozen again, the pockets are "
    "gone. Then the street is loud once more, and every step can be heard from far away.",
    "A good tool tells the hand what it is doing. A sharp plane sings on the wood, and a blunt one tears it. People who "
    "work with their hands hear and feel such things long before they see them, and they sharpen the blade before it does "
    "any harm. A machine has to be told by a number on a screen what the carpenter knows from the sound.",
    "Money is a promise that nearly everybody believes. A coin of gold was worth what it weighed, but a note is only paper, "
    "and a sum in a bank is only an entry in a book. As long as the baker takes it for bread, and the farmer takes it from "
    "the baker for corn, it works. When the belief is lost, people go back to trading eggs for shoes.",
)


def rows() -> list[dict[str, str]]:
    """Return the paragraphs as rows: `id` and `text`."""
    return [{"id": f"prose/{number}", "text": text} for number, text in enumerate(PARAGRAPHS, 1)]
