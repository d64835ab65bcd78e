"""The words of the built-in corpus: every table and every plot of `tinyllm.tales`, as plain data.

Three marks are all the notation there is:

    [red|blue|green]   choose one; the options stand in order of likelihood
    {hero}             say the thing called `hero`; it is chosen where it is first said, then remembered
    an empty line      a new paragraph (all other line breaks are only for the eye)

A list is a thing to be chosen and remembered. A dict is the same, but choosing a key also makes its facts
known: once the hero is "Milo", {he} is "he"; once the story plays by the pond, {hide} offers reeds and lily
leaves. A string is a phrase, told anew each time it is used. The one rule for authors: the options of one
choice must differ from their first words on, none may begin with the whole of another (a test checks it).
"""

HE = {"he": "he", "He": "He", "his": "his", "His": "His", "him": "him", "himself": "himself"}
SHE = {"he": "she", "He": "She", "his": "her", "His": "Her", "him": "her", "himself": "herself"}

# Names go with kinds, so a name tells the reader (and the model) who is meant.
NAMES = {
    "mouse": {"Milo": HE, "Pippa": SHE, "Tib": HE, "Dot": SHE},
    "rabbit": {"Clover": SHE, "Bobbin": HE, "Fern": SHE, "Rollo": HE},
    "hedgehog": {"Otto": HE, "Thistle": SHE, "Bramble": HE, "Prim": SHE},
    "girl": {"Nora": SHE, "Ada": SHE, "Lily": SHE, "Rosa": SHE},
    "boy": {"Tom": HE, "Leo": HE, "Sam": HE, "Emil": HE},
    "fox": {"Rusty": HE, "Ember": SHE, "Felix": HE, "Saffron": SHE},
    "bear": {"Bruno": HE, "Martha": SHE, "Barley": HE, "Olga": SHE},
    "squirrel": {"Maple": SHE, "Conker": HE, "Tansy": SHE, "Hal": HE},
    "otter": {"Finn": HE, "Pebble": SHE, "Ollie": HE, "Marina": SHE},
    "badger": {"Bertie": HE, "Nettle": SHE, "Monty": HE, "Sage": SHE},
}

# Choosing the hero's kind settles which names are open, and that the friend is of another kind.
KINDS = {
    kind: {"hero": names, "pal_kind": {k: {"pal": list(NAMES[k])} for k in NAMES if k != kind}}
    for kind, names in NAMES.items()
}

# Each place has its own hiding places and its own sounds.
PLACES = {
    "by a pond": {
        "place": "the pond",
        "hide": ["among the reeds", "under a lily leaf", "in a leaky boat", "behind the ducks"],
        "sound": "[frogs|ducks] were [singing|splashing]",
    },
    "near a wood": {
        "place": "the wood",
        "hide": ["under a fern", "in a hollow log", "behind a mossy stone", "between two roots"],
        "sound": "[crows|doves] were [calling|nesting]",
    },
    "on a hill": {
        "place": "the hill",
        "hide": ["in the grass", "behind a grey rock", "under a thorn bush", "beside the wall"],
        "sound": "[sheep|goats] were [eating|resting]",
    },
    "close to the sea": {
        "place": "the beach",
        "hide": ["in a rock pool", "under some seaweed", "behind a sand castle", "inside a wet basket"],
        "sound": "[gulls|waves] were [shouting|dancing]",
    },
    "in an orchard": {
        "place": "the orchard",
        "hide": ["in the long grass", "under an apple basket", "behind a ladder", "below the pear tree"],
        "sound": "[bees|birds] were [humming|feasting]",
    },
    "behind a farm": {
        "place": "the farm",
        "hide": ["in the hay", "under the cart", "behind a milk pail", "beside the pigs"],
        "sound": "[hens|cows] were [talking|dozing]",
    },
}

# Toys go with what they are made of: a scarf is woollen, a kite is paper. {joy} is what one did with it.
SCARF = {"toy": "scarf", "joy": "wore"}
HAT = {"toy": "hat", "joy": "wore"}
KITE = {"toy": "kite", "joy": "flew"}
CROWN = {"toy": "crown", "joy": "wore"}
BOAT = {"toy": "boat", "joy": "sailed"}
FLUTE = {"toy": "flute", "joy": "played"}
BELL = {"toy": "bell", "joy": "rang"}
WHISTLE = {"toy": "whistle", "joy": "blew"}
PAINTED = {
    "thing": {
        "woollen scarf": SCARF,
        "paper kite": KITE,
        "wooden boat": BOAT,
        "woollen hat": HAT,
        "wooden flute": FLUTE,
        "paper crown": CROWN,
    }
}
POLISHED = {"thing": {"bell": BELL, "whistle": WHISTLE}}
COLOURS = {"red": PAINTED, "blue": PAINTED, "silver": POLISHED, "yellow": PAINTED, "green": PAINTED}

FEARS = {
    "the dark": {
        "dread": "[giant|ghost|monster]",
        "task": "fetch [candles|jam|coal] from the cellar",
        "truth": "[a coat on a hook|a broom in a hat|a sleepy cat]",
    },
    "thunder": {
        "dread": "[dragon|troll|monster]",
        "task": "take [soup|a letter|bread] to the mill, storm or no storm",
        "truth": "[a noisy cloud|a loud but polite sky|rain with a drum]",
    },
    "deep water": {
        "dread": "[pike|eel|monster]",
        "task": "cross the river with [a letter|eggs|a ladder]",
        "truth": "[two fish playing tag|a floating leaf|a very surprised duck]",
    },
}

CHORES = {
    "water {pal}'s beans": {"bad": "the beans had dried up", "good": "the beans stood up straight"},
    "feed {pal}'s hen": {"bad": "the hen was hungry and cross", "good": "the hen had laid an egg"},
    "mind {pal}'s fire": {"bad": "the fire was out", "good": "the fire was burning brightly"},
    "sweep {pal}'s house": {"bad": "the house was full of dust", "good": "the house was shining"},
}

CRAFTS = {
    "lamp": {"from": "[a jam jar|a tin cup|a glass bowl]", "use": "lit it"},
    "hat": {"from": "[straw|an old sock|leaves]", "use": "wore it"},
    "drum": {"from": "[a milk pail|a tin cup|a hollow log]", "use": "played it"},
    "puppet": {"from": "[an old sock|straw|a wooden spoon]", "use": "danced with it"},
    "scarf": {"from": "[wool|an old blanket|ribbons]", "use": "wore it"},
}

ELDERS = {
    "the old owl": {"Elder": "The old owl"},
    "the grey heron": {"Elder": "The grey heron"},
    "the kind tortoise": {"Elder": "The kind tortoise"},
    "the wise goose": {"Elder": "The wise goose"},
}

# Phrases shared by all plots. Two tables of a sort (odd and hue, first and second guest) keep a list of things
# from naming one twice.
PHRASES = {
    "nature": "[curious|cheerful|shy|dreamy|stubborn|sleepy|merry|clumsy|playful|lazy|clever|nosy]",
    "temper": "[gentle|noisy|kind|polite|silly|grumpy|patient|quick|proud|wise|serious|cheeky]",
    "odd": "[tiny|lucky|broken|shiny|bent|crooked|rusty|funny|magic|heavy]",
    "hue": "[brown|white|black|pink|golden|spotted|striped|purple|grey|speckled]",
    "shade": "[red|blue|green|yellow|scarlet|cream|violet]",
    "trinket": "[button|key|spoon|pencil|coin|cork|comb|nail|marble|hook]",
    "treasure": "[feather|shell|stone|nut|leaf|ribbon|bean|bead|pebble|acorn]",
    "like": "[rain|jokes|puddles|songs|naps|stars|socks|riddles|clouds|snails|maps]",
    "sport": "[climbing|skipping|digging|dancing|painting|whistling|fishing|running|juggling|sneezing]",
    "sky": "[misty|sunny|windy|golden|grey|chilly|bright|still|warm|fine]",
    "number": "[two|three|four|five|six|seven|eight|nine|ten|twelve]",
    "taste": "[warm|sweet|fresh|sticky|soft|hot|spicy|crunchy]",
    "fruit": "[apple|plum|cherry|honey|nut|berry|carrot|pear]",
    "wet": "[wet|cold|tired|thin|shy|lost|hungry|sad|dusty|shivering]",
    "guest1": "[hen|duck|lamb|crow|frog|pig|dove|cat]",
    "old": "[fat|young|lonely|muddy|worried|nervous|little|bashful|sleepy|hopeful]",
    "guest2": "[goose|toad|beetle|snail|moth|donkey|goat|pony]",
    "woeful": "[sighed|sniffed|groaned|whispered|mumbled|wailed]",
    "gladly": "[cried|laughed|cheered|sang|shouted|called]",
    "kindly": "[kindly|softly|gently|quickly|firmly|with a smile|with a bow|with a wink]",
    "went": "[hurried|walked|marched|trotted|skipped|raced|crept]",
    "glad": "[happy|proud|merry|pleased|cheerful|jolly|content]",
    "simile": "[a king|a lark|a cat in cream|a frog in rain|a bee in clover|a pig in mud|a dog with two tails|a duck in June|a mayor]",
    "noise": "[a drum|a kettle|a cart|a rusty gate|a bag of nails|a box of spoons|a mill|a train]",
    "week": "[all day|all week|every morning|every night|every Sunday|until bedtime|for a month|before supper|at breakfast]",
    "search": "[under|behind] the [bed|stove|clock|stairs|table|piano|sofa|chair], in the [bath|attic|cellar|oven|bread bin]",
    "look": "[small|young|little|round|thin|plump|tiny]",
    "wears": "[hat|scarf|coat|cap|ribbon|shawl|bow]",
    "rude": "[silly|bossy|soggy|stubborn|lumpy] [turnip|onion|sock|potato|goose]",
    "ruder": "[hairy|greedy|pickled|wobbly|noisy] [cabbage|bucket|pudding|carrot|goat]",
    "treat": "{taste} [buns|plums|figs|toffees|pancakes|dumplings|rolls|nuts]",
    "tellings": "[jokes|stories|riddles|songs]",
    "gasped": "[cried|shouted|called|yelled]",
    "lesson": "[So remember:|Ever after {hero} knew that|The old folk say that|And so {hero} learned that]",
}

OPENING = """
[Once there was|There was once|Long ago there was|Once upon a time there was] a {look} {nature} {kind} called {hero}, who
[had a house|lived] {at} and [kept a {odd} {trinket} and a {hue} {treasure} under {his} [pillow|bed|hat]
|liked {like}, {taste} {fruit} [pie|cake|tart|buns] and {sport}].
[{His} best friend|The nearest neighbour] was a {temper} {pal_kind} called {pal}, who wore a {shade} {wears}.

[One {sky} {hour}|On a {sky} {hour} in [spring|summer|autumn]] {hero} {plot}
"""

# Each plot goes on from "One misty morning Milo ...", and each begins with a verb of its own.
LOST = """
[reached|looked] for {his} {colour} {thing}, but it was [gone|missing|not there]. {He} searched {search} and even
in the [soup|butter|teapot|jam], and found only [dust|{number} crumbs|a {odd} {trinket}]. "[Oh dear|Oh no|Bother]!"
{hero} {woeful}.

So the two friends {went} to {place}, where {sound}, and turned over {number} {hue} [stones|leaves|shells|buckets].
Then {pal} [waved|pointed|hopped]: there, {hide}, lay the {colour} {toy}, [damp|cold|muddy] but [whole|safe].
"[Clever|Good|Dear] {pal}!" {gladly} {hero}, as {glad} as {simile}, and {joy} the {toy} {week}. {lesson}
[four eyes see more than two|asking for help is half of finding|a friend is the best thing to find
|what is lost alone is found together].
"""

MEAL = """
[baked|made] a {taste} {fruit} {dish}, and then there came a [tap|knock|thump] at the door. "I [burned|dropped]
my [lunch|dinner|soup]," {pal} {woeful}, with a tummy that rumbled like {noise}. "[Come in|Sit down|Pull up a chair],"
{hero} said {kindly}, and cut the {dish} in two.

Soon a {wet} {guest1} looked in with {number} {treat}, and then a {old} {guest2} with a [jar|pot|bowl|pail] of
[cream|beans|cheese|jelly|milk]. They told {number} {tellings}, and {hero} went to bed as {glad} as {simile}. {lesson}
[half a meal with a friend is a feast|a shared supper grows|an open door is the best spice
|there is always room for one more].
"""

FEAR = """
[trembled at the thought of|woke up afraid of] {fear}, for that day {he} had to {task}. {His} [knees|teeth|bones]
[rattled|shook] like {noise}. "I shall meet a [huge|hungry|hairy|purple|striped] {dread} with {number}
[heads|eyes|tails|tongues]!" {he} {woeful}.

{pal} did not laugh, but {went} with {him} to {elder}. "[Breathe in|Hum a song|Count your steps]," said {elder} {kindly}.
"[Lions|Kings|Heroes] [shake|tremble|wobble] too." So {hero} went, {number} steps, then {number} more, and found
only {truth}! As {glad} as {simile}, {he} thanked {elder} with a {taste} {fruit} {dish}. {lesson}
[fear shrinks when you look at it|brave knees may wobble|most monsters are made of air|a small step beats a big fear].
"""

PROMISE = """
[promised|gave {his} word] to {chore} while {pal} was out buying [ink|soap|candles|string]. But soon a [fair|band|circus]
came by with {number} {hue} [drums|flags|ponies|clowns|dancing dogs], and {hero}'s [feet|toes|knees] began to
[dance|itch|twitch].

{He} [{went} after it, ate {number} {treat} and forgot everything. When {pal} came home, {bad}. "I am so sorry,"
{hero} {woeful}, and worked for {number} days, until {pal} smiled and made a {taste} {fruit} {dish} for two. {lesson}
[a promise is easier to keep than to mend|sorry needs two busy hands|good work mends a broken word]
|stayed, and sang {number} [merry|sad|silly|long|old] songs to pass the time. When {pal} came home, {good}. "You are
[as good as gold|a true friend|a marvel]!" {pal} {gladly}, and gave {hero} {number} {treat} and a {odd} {trinket}. {lesson}
[fun can wait but a friend should not|a kept promise is worth more than gold|your word is the best thing you can give]].
"""

GIFT = """
[remembered|recalled] that it was nearly {pal}'s birthday, but {his} [purse|piggy bank|pocket] held only a {odd}
{trinket}. So {he} made a {shade} {craft} out of {from} and [glued|tied|stuck] {number} {hue}
[feathers|shells|buttons|beads|bells] to it. It came apart in {number} places, rattled like {noise} and smelled of
[fish|cheese|onions|glue|soap]. "It is [ugly|odd|too small]," {he} {woeful}, but wrapped it in a [clean|checked|woollen|silk|patched] [sock|napkin|cloth|apron].

{pal} opened it [slowly|quickly|last|at once] and grew [quiet|pink|red]. "No [king|queen|duke] has one like it!" {pal} {gladly}, as {glad} as
{simile}, and {use} {week}. {lesson}
[the best gifts are made of time|love does not mind a crooked edge|a gift is as big as the heart behind it
|no shop sells what a friend can make].
"""

STORM = """
[set off|started out] with {pal} for a picnic near {place}, with {number} {treat} and a [cherry|plum|berry|honey|lemon] cake. Soon the sky went as
black as [a boot|a kettle|ink|coal], and the rain came down in [buckets|ropes|sheets|barrels].
"[Run|This way|Quick|Follow me]!" {hero} {gasped}, and they [dashed|splashed|tumbled] into
[a hollow tree|an old barn|a small cave|an empty cart|a garden shed].

"Is there room [for me|for one more|in there]?" asked a {wet} {guest1}. "[Always|Of course|Plenty]," said {hero}
{kindly}. Next came a {old} {guest2} with {number} [children|cousins|bags|umbrellas]. They told {number} {tellings} and ate
every crumb while the thunder rumbled like {noise}, and {hero} was as {glad} as {simile}. {lesson}
[a small roof can hold many friends|the best roof is good company|no storm can spoil a picnic with friends
|a storm is short but a friend is for ever].
"""

QUARREL = """
[quarrelled|fought] with {pal} over a {odd} {prize}. "It is mine, you {rude}!" {gasped} {hero}.
"No, mine, you {ruder}!" {gasped} {pal}. They [stamped|marched|stormed] home and slammed {number} doors.

Home alone, {hero} found life as dull as [dust|mud|ditch water|old bread]. {He} {went} to {elder}. "Would you rather [be right|win] or
[be happy|have a friend]?" asked {elder} {kindly}. {hero} thought for {number} minutes and ran to find {pal}. On the
[path|bridge|corner] they bumped [heads|noses|knees]. "I am sorry," {hero} {woeful}. "I am sorrier," {pal} [sobbed|murmured|replied|hiccupped].
They shared the {prize} {week}, and thanked {elder} with a {taste} {fruit} {dish}. {lesson}
[it is better to be friends than to be right|a quarrel is too heavy to carry|it takes two to make peace
|sorry is a short bridge over a wide river].
"""

STRANGER = """
[met|found] a {wet} {guest} on the way to {place}. "I have lost my {shade} {loss}," the {guest} {woeful}. A {old} {guest2} and
{number} [sheep|cats|peacocks|rats] had [hurried|walked|trotted] past. "[Let me help|Do not cry|Cheer up]," {hero}
said {kindly}, and called {pal}.

They looked under {number} {hue} [stones|leaves|shells|buckets], got mud on their [noses|hats|knees|chins], and at last
found the {loss} {hide}. As {glad} as {simile}, the {guest} gave {hero} a {hue} {treasure}. When the snow came, so did
a parcel with {number} {treat} and a [letter|poem|drawing] from their new friend. {lesson}
[a stranger may be a friend|kindness is never late|no good deed is too small|whoever stops to help is never alone].
"""

PLOTS = [LOST, MEAL, FEAR, PROMISE, GIFT, STORM, QUARREL, STRANGER]

# All that is known before a story begins. What is not here becomes known when something is chosen.
WORLD = {
    **PHRASES,
    "hour": "[morning|afternoon|day]",
    "kind": KINDS,
    "at": PLACES,
    "colour": COLOURS,
    "fear": FEARS,
    "chore": CHORES,
    "craft": CRAFTS,
    "elder": ELDERS,
    "dish": ["pie", "cake", "tart", "pudding"],
    "prize": ["button", "key", "spoon", "whistle", "coin"],
    "loss": ["boot", "map", "purse", "hat", "watch", "violin"],
    "guest": ["wren", "hare", "robin", "lizard", "pigeon"],
    "plot": "[" + "|".join(PLOTS) + "]",
}
