"""The words, names and sentences of the tasks, and the rule that splits them into seen and held out.

Everything that a task draws from is named by a key (a sentence, a pair of colour and shape, an emoji). Whether a key
may occur in training is decided by a hash of the key alone, so that every script, on every machine, agrees without a
list: `held_out(key, share)`. A held-out key never occurs in training, in any task.
"""
import hashlib

COLOURS = {"red": (222, 38, 38), "green": (30, 160, 60), "blue": (40, 80, 225), "yellow": (245, 215, 40), "orange": (250, 135, 20),
           "purple": (135, 45, 175), "pink": (250, 140, 190), "brown": (125, 75, 35), "black": (15, 15, 15), "white": (250, 250, 250)}
SHAPES = ["circle", "square", "triangle", "star", "heart", "cross", "ring", "diamond", "moon"]
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
PLACES = ["top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right"]
MOTIONS = ["moves left", "moves right", "moves up", "moves down", "grows", "shrinks", "blinks", "changes colour"]

PEOPLE = "anna ben clara david emma frank grace henry lucy martin nora oscar peter rosa sam tom".split()
ADJECTIVES = ("big small old young happy sad quick slow bright dark clean dirty warm cold soft hard heavy light quiet loud "
              "empty full new little tall short round strange").split()
ANIMALS = "cat dog horse cow sheep pig mouse bird fish frog fox bear lion rabbit duck goose owl snake turtle monkey".split()
THINGS = ("table chair book lamp clock door window garden house tree flower river bridge road boat train car bicycle ship kite "
          "ball box bag bottle cup plate spoon knife key letter picture mirror candle basket ladder hammer bell drum guitar").split()
FOODS = "apple banana orange lemon cherry potato tomato carrot onion bread cheese egg cake soup rice pie pear peach".split()
DRINKS = "water tea coffee milk juice".split()
BUILDINGS = "school shop market station church library bakery farm castle harbour museum office park".split()
DAYS = "monday tuesday wednesday thursday friday saturday sunday".split()
TIMES = "today tomorrow tonight now later soon again".split()
VERBS = "open close find bring paint clean carry move hold wash hide break lift show count watch".split()
PAST = "saw found lost carried painted liked wanted bought sold followed watched heard remembered touched dropped hid".split()
WENT = "went walked ran drove came hurried travelled returned".split()
PREPOSITIONS = "under behind beside near above below inside".split()
WEATHER = "sunny rainy windy cloudy snowy foggy stormy".split()
PLURALS = {"sheep": "sheep", "fish": "fish", "mouse": "mice", "goose": "geese", "fox": "foxes", "cherry": "cherries", "potato": "potatoes",
           "tomato": "tomatoes", "peach": "peaches", "knife": "knives", "box": "boxes", "bench": "benches", "cross": "crosses"}


def held_out(key, share=0.12):
    """Whether this key is kept away from training: about `share` of all keys are, by their hash."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "little") < share * 2 ** 32


def plural(noun):
    return PLURALS.get(noun, noun + "s")


def counted(n, colour, shape):
    """`two red circles`, `one blue star`."""
    return f"{NUMBERS[n]} {colour} {shape if n == 1 else plural(shape)}"


def article(phrase):
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def sentence(rng):
    """A sentence of the little grammar that speech and reading use: 4 to 10 words, lower case, no punctuation."""
    one = lambda words: words[int(rng.integers(len(words)))]
    adjective, noun, other, person = one(ADJECTIVES), one(ANIMALS + THINGS), one(THINGS), one(PEOPLE)
    colour, number = one(list(COLOURS)), NUMBERS[int(rng.integers(2, 11))]
    kinds = [
        lambda: f"the {adjective} {noun} is {one(PREPOSITIONS)} the {other}",
        lambda: f"the {one(ANIMALS)} {one(PAST)} the {adjective} {other}",
        lambda: f"{person} {one(PAST)} {number} {plural(noun)}",
        lambda: f"{person} {one(PAST)} {article(adjective)} {colour} {other}",
        lambda: f"please {one(VERBS)} the {other} {one(TIMES)}",
        lambda: f"there are {number} {colour} {plural(one(SHAPES + THINGS))} {one(PREPOSITIONS)} the {other}",
        lambda: f"{person} and {one(PEOPLE)} {one(WENT)} to the {one(BUILDINGS)} on {one(DAYS)}",
        lambda: f"i would like {number} {plural(one(FOODS))} and some {one(DRINKS)}",
        lambda: f"turn {one(['left', 'right'])} at the {one(BUILDINGS)} and walk {number} steps",
        lambda: "my number is " + " ".join(one(NUMBERS[:10]) for _ in range(int(rng.integers(3, 6)))),
        lambda: f"it is {one(WEATHER)} and {one(['warm', 'cold'])} on {one(DAYS)}",
        lambda: f"where is the {adjective} {noun} of {person}",
        lambda: f"the {colour} {other} and the {one(ADJECTIVES)} {noun} are in the {one(BUILDINGS)}",
        lambda: f"we {one(WENT)} from the {one(BUILDINGS)} to the {one(BUILDINGS)} {one(TIMES)}",
        lambda: f"how many {plural(noun)} are in the {other}",
        lambda: f"{person} will {one(VERBS)} the {adjective} {other} on {one(DAYS)}",
    ]
    return one(kinds)()


def words():
    """Every word that a sentence may hold, for single-word speech and for reading."""
    out = set(COLOURS) | set(SHAPES) | set(NUMBERS)
    for group in (PEOPLE, ADJECTIVES, ANIMALS, THINGS, FOODS, DRINKS, BUILDINGS, DAYS, TIMES, VERBS, PAST, WENT, PREPOSITIONS, WEATHER):
        out |= set(group)
    out |= {plural(w) for w in ANIMALS + THINGS + FOODS + SHAPES}
    return sorted(out)
