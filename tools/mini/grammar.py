"""The grammar that writes the text of the mini corpus.

About two hundred and fifty common words and some forty sentence patterns. A
pattern is a line of words and ``<slots>``; a slot is filled by one line of its
list, which may again hold slots. Text is what LibriSpeech's transcripts are:
uppercase letters, spaces and apostrophes, numbers spelled out.

Words were chosen so that every phone of American English occurs often, and so
that hardly two of them sound alike: a recogniser is to be tried for hearing, not
for spelling.
"""

import re
from collections import Counter
from collections.abc import Collection

import numpy as np

# One alternative a line; blank-separated words are alternatives where "|" is absent.
_SLOTS = {
    "name": "TOM MARY JOHN DAVID LUCY PETER SARAH JACK ALICE",
    "who": "<name>|<name>|<person>",
    "person": "THE <job>|MY <kin>|OUR <kin>|THE <age> <human>",
    "job": "TEACHER DOCTOR FARMER CAPTAIN JUDGE NURSE",
    "kin": "BROTHER SISTER FATHER MOTHER UNCLE",
    "human": "MAN WOMAN BOY GIRL",
    "age": "YOUNG OLD",
    "crowd": "CHILDREN VISITORS STUDENTS",
    "city": "LONDON PARIS CHICAGO BOSTON DENVER",
    "place": "STATION MARKET SCHOOL HARBOUR FOREST VILLAGE BRIDGE CHURCH BEACH",
    "room": "KITCHEN GARDEN BEDROOM OFFICE GARAGE HALL",
    "device": "LIGHT RADIO HEATER CAMERA",
    "opening": "DOOR WINDOW GATE",
    "animal": "DOG HORSE FOX MOUSE BIRD GOAT",
    "creature": "<quality> <animal>|<colour> <animal>|<animal>",
    "quality": "LITTLE HUNGRY QUIET LAZY STRANGE HUGE",
    "colour": "GREEN YELLOW BLACK WHITE BROWN SILVER",
    "object": "BASKET JACKET HAMMER TICKET WATCH PICTURE TOY",
    "things": "BOXES BOTTLES LETTERS APPLES FLOWERS BOOKS CUPS SHOES KEYS TOYS",
    "food": "BREAD CHEESE SOUP RICE FISH",
    "drink": "COFFEE TEA WATER MILK",
    "furniture": "TABLE SHELF CHAIR BENCH",
    "digit": "TWO THREE FOUR FIVE SIX SEVEN EIGHT NINE TEN",
    "teen": "ELEVEN TWELVE THIRTEEN FIFTEEN",
    "tens": "TWENTY THIRTY FORTY FIFTY SIXTY SEVENTY EIGHTY NINETY",
    "number": "<digit>|<digit>|<teen>|<tens>|<tens> <digit>",
    "hour": "ONE THREE FIVE SIX SEVEN NINE TEN ELEVEN",
    "time": "AT <hour> O'CLOCK|AT HALF PAST <hour>|BEFORE <hour>|AFTER <hour>|AROUND NOON",
    "day": "MONDAY TUESDAY WEDNESDAY THURSDAY FRIDAY SATURDAY SUNDAY",
    "month": "JANUARY APRIL JULY OCTOBER",
    "when": "ON <day>|YESTERDAY|LAST <day>|LAST WINTER|THIS MORNING",
    "soon": "TOMORROW|NEXT <day>|IN <month>|THIS EVENING|LATER",
    "weather": "RAIN SNOW FOG THUNDER SUNSHINE",
    "bought": "BOUGHT FOUND CARRIED SOLD PAINTED",
    "moved": "JUMPED WALKED RAN CRAWLED",
    "across": "OVER ACROSS THROUGH ALONG TOWARDS",
    "under": "UNDER BEHIND BESIDE",
    "feeling": "HAPPY TIRED ANGRY SICK",
    "degree": "VERY RATHER",
    "street": "OAK RIVER STONE",
    "sense": "SAW HEARD WATCHED",
}
_PATTERNS = """
TURN ON THE <device> IN THE <room> <soon>
PLEASE TURN OFF THE <device> IN THE <room>
PLEASE OPEN THE <colour> <opening> OF THE <room>
SHUT THE <opening> OF THE <room> BEFORE THE <weather> COMES
PUT THE <colour> <object> <under> THE <furniture>
BRING ME A CUP OF <drink> AND SOME <food>
GIVE THE <creature> SOME <food> AND SOME <drink>
DON'T FORGET THE <colour> <object> IN THE <room>
DON'T TOUCH THE <quality> <animal> <under> THE <furniture>
CALL <who> AND <who> <time>
PLEASE WAKE ME <time> ON <day>
<who> <bought> <number> <colour> <things> <when>
<who> AND <who> <bought> <number> <things>
<who> <bought> A <colour> <object> IN <city> <when>
<when> <who> <bought> A <quality> <animal> IN <city>
THE <creature> <moved> <across> THE <place> <when>
A <creature> <moved> <across> THE <room> AND <moved> <across> THE <furniture>
THE <crowd> <moved> TO THE <place> <when>
THE <crowd> <sense> A <creature> NEAR THE <place>
<who> <sense> THE <crowd> <under> THE <place> <when>
THERE ARE <number> <colour> <things> ON THE <furniture>
THERE IS A <quality> <animal> <under> THE <furniture>
<who> WORKS AT NUMBER <number> <street> STREET
<who> WILL TRAVEL TO <city> AND <city> <soon>
THE TRAIN FROM <city> TO <city> LEAVES <time>
THE BUS FROM <city> ARRIVES ON <day> <time>
THE NEXT BOAT LEAVES THE HARBOUR <time> ON <day>
IT WILL BE <number> DEGREES IN <city> <soon>
WE EXPECT <weather> AND <weather> IN <city> <soon>
WHEN THE <weather> STOPS WE WILL WALK TO THE <place>
IF YOU ARE <feeling> THEN DRINK SOME <drink> WITH <who>
<who> WAS <degree> <feeling> <when>
<who> ISN'T <feeling> BECAUSE THE <food> IS <degree> GOOD
I THINK <who> LIKES <food> AND <colour> <things>
I CAN'T FIND MY <colour> <object> IN THE <room>
WHERE DID <who> PUT THE <colour> <object> <when>
WHY IS THE <creature> IN THE <place> SO <feeling>
HOW MANY <colour> <things> DO YOU USUALLY BUY IN <month>
WE CHOSE A <colour> <object> AND <number> <things>
THEY USUALLY EAT <food> WITH <drink> ON <day>
THE <colour> <object> ON THE <furniture> BELONGS TO <who>
<person> AND <who> WENT TO THE <place> <time>
"""
_SLOT = re.compile(r"<(\w+)>")


def _alternatives(line: str) -> list[str]:
    return line.split("|") if "|" in line else line.split()


SLOTS = {slot: _alternatives(line) for slot, line in _SLOTS.items()}
PATTERNS = _PATTERNS.strip().split("\n")
VOCABULARY = frozenset(
    word
    for line in PATTERNS + [line for lines in SLOTS.values() for line in lines]
    for word in _SLOT.sub(" ", line).split()
)


def sentence(rng: np.random.Generator) -> str:
    """Return one sentence: a pattern drawn evenly, its slots filled evenly, no filling twice."""
    text = PATTERNS[rng.integers(len(PATTERNS))]
    used = set()
    while match := _SLOT.search(text):
        lines = [line for line in SLOTS[match[1]] if line not in used]
        line = lines[rng.integers(len(lines))]
        if "<" not in line:  # nobody calls Tom and Tom
            used.add(line)
        text = text[: match.start()] + line + text[match.end() :]
    return text


def sentences(
    rng: np.random.Generator,
    count: int,
    exclude: Collection[str] = (),
    seen: Counter | None = None,
    candidates: int = 60,
) -> list[str]:
    """Return ``count`` different sentences whose words are used about equally often.

    Each sentence is the one, of a few drawn, whose words have been rarest so far
    (mean over its words of (1 + uses)^-3: the power makes one rare word
    outweigh several that are merely uncommon).

    Arguments
    ---------
    rng : numpy.random.Generator
        Where the draws come from.
    count : int
        How many sentences.
    exclude : collection of str
        Sentences that may not be used.
    seen : Counter, optional
        Word counts to balance against; updated in place.
    candidates : int
        How many sentences each is chosen from (default 60).

    Raises
    ------
    ValueError
        Where the grammar runs out of unused sentences.
    """
    taken = set(exclude)
    seen = Counter() if seen is None else seen
    chosen: list[str] = []
    for _ in range(count):
        drawn = [text for text in (sentence(rng) for _ in range(candidates)) if text not in taken]
        if not drawn:
            raise ValueError(
                f"no unused sentence in {candidates} draws after {len(chosen)} of {count}: "
                "ask for fewer sentences or more candidates"
            )
        best = max(drawn, key=lambda text: np.mean([(1 + seen[w]) ** -3.0 for w in text.split()]))
        seen.update(best.split())
        taken.add(best)
        chosen.append(best)
    return chosen
