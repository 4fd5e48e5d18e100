"""The built-in text for calibration where the user gives none and the model is too large to write its own.

Written for this project: plain English of homes, kitchens and warehouses, instructions, reports and talk. It
shares no sentence with evaluation_text.py, on which builds are measured.
"""

import re

NAME = "builtin-calibration-english-1"

TEXT = """\
Bring the laundry basket to the bathroom and sort the clothes by colour. The white shirts go into the left \
machine, the dark trousers into the right one. Do not wash the wool pullover; it has to be cleaned by \
hand. If you find coins or keys in a pocket, lay them on the small shelf beside the mirror. Tell me how \
long the programme takes, and remind me ten minutes before it ends.

"Where is the remote control?" asked Grandfather. The robot turned its head to the sofa. "I saw it under \
the newspaper at half past three," it answered. "Shall I fetch it for you?" Grandfather nodded. The robot \
moved around the carpet, lifted the paper with two fingers and found the remote control, a pencil and half \
a biscuit. It carried all three of them back on a tray. "I am not sure whether you also want the biscuit," \
it said, and Grandfather had to smile.

Order 48213 has four lines: twelve boxes of screws, two rolls of tape, one drill and a pair of gloves in \
size nine. The screws are stored in aisle C, rack 14, level 2. The tape lies next to them. The drill is \
kept in the locked cage, so a worker has to open it first. Pack heavy goods at the bottom and fragile \
goods on top. Weigh the parcel before you close it; the scale should show between 8.2 and 8.6 kilograms. \
When the label is printed, stick it on the longest side and push the parcel onto the conveyor.

A forklift is coming from the loading dock. Slow down to walking speed, keep to the right side of the \
yellow line and give way. The driver cannot see you behind the pallets. Wait until the blue light on the \
floor is gone, then cross. If your path stays blocked for longer than thirty seconds, plan another route \
through aisle F and report the delay to the dispatcher.

How do I make tomato soup for six people? Cut two onions into small cubes and fry them in a spoon of \
butter until they are soft. Add a kilogram of ripe tomatoes, half a litre of water, salt, pepper and a \
little sugar. Let everything simmer for twenty minutes with the lid on. Stir from time to time so that \
nothing burns. Then blend the soup, taste it, and pour it into warm bowls. Fresh basil and a slice of \
bread go well with it.

Battery at 23 percent. Left wheel motor 41 degrees, right wheel motor 44 degrees. Two of five rooms are \
cleaned: the hall and the study. The bedroom door was closed, so I skipped it. Under the desk I met a \
cable that I could not lift, and I left a narrow strip there untouched. I am going back to my dock now and \
will continue with the kitchen at about four o'clock, unless you would like me to stop for today.

The children were building a tower of wooden blocks. Every time it was taller than the chair, it began to \
lean, and then it crashed down with a loud noise. "Why does it always fall?" said Mia. The robot measured \
the blocks with its camera. "The third block from below is a bit shorter on one side," it explained. "If \
you turn it round, the tower will stand straight." They tried it, and this time the tower reached up to \
the lamp. Nobody dared to breathe. Then the cat jumped onto the table, and that was the end of the tower.

Pick up the red cube. Put the red cube on the green plate. Open the top drawer, place the spoon inside and \
close the drawer again. Move the bottle to the left of the bowl. Push the chair under the table. Hand me \
the screwdriver with the black handle. Follow the person in the orange jacket. Go to the charging station. \
Turn off the lamp in the corridor. Count the apples on the counter and say the number aloud.

It rained all night, and in the morning the cellar was full of water. Mr. Lopez called the fire brigade, \
but they had many other calls and could only come in the afternoon. So the neighbours brought buckets, and \
the delivery robot from the corner shop carried the full ones up the stairs, one in each hand, without \
getting tired. By noon the floor was nearly dry. They opened the windows, hung the wet carpets over the \
fence and drank coffee together in the sun.

Before you take a glass, look at it from two sides. Is it upright? Is anything in it? Is the rim chipped? \
Choose a grip close to the bottom and close the fingers gently until you feel a force of one newton. Lift \
it straight up by five centimetres, wait a moment and check that it does not slip. Only then move \
sideways. Glass breaks easily and cuts, so if a piece falls down, keep people and pets away and call \
somebody with a broom.

User: Can you help me find something to read for my nephew? He is eight and loves trains.
Assistant: Of course. There are three books about trains on the lower shelf: one on steam engines with \
many pictures, one story about a signal keeper, and a thin one on building a model railway. The story is \
the easiest to read. Shall I bring it to you?
User: Yes, and please the one with the pictures too.
Assistant: I am on my way. I will lay both books on the round table in the living room.

The museum guide rolled slowly through the hall and stopped in front of a large painting. "This picture \
was made in the year 1889," it began. "The artist lived in a small town in the south of France. Look at \
the sky: the brush strokes go round and round, as if the wind could be seen." A girl raised her hand. "Is \
that the moon or the sun?" "It is the moon," said the guide, "but many people ask the same question, \
because it is so bright." Then it led the group on to the next room, where the light was dim and the floor \
made no sound.

Maintenance plan for the week. Monday: clean the lenses, check the emergency stop, tighten the bolts of \
the gripper. Tuesday: update the map of hall two, since the shelves were moved. Wednesday: replace the \
front bumper of vehicle seven. Thursday: test the brakes with full load on the ramp; the distance must be \
shorter than sixty centimetres. Friday: copy the logs, write the report and send it to the office. If a \
test fails, hang a red card on the vehicle and take its key.

There was once a lighthouse keeper who had a mechanical bird. The bird could not fly, but it could sing, \
and it knew which ship was which by the sound of its horn. On foggy evenings the keeper put the bird on \
the railing, and it called out the names across the water: the Heron, the Three Brothers, the Queen of the \
North. The sailors listened for their name and knew how far they were from the rocks. When the keeper grew \
old, he taught the bird one more song, the one his mother used to sing, and after he was gone it sang that \
song every night, exactly at nine.

I have put the groceries away. The yoghurt and the cheese are in the fridge, the flour is on the upper \
shelf, and the potatoes lie in the dark box under the stairs. We are out of rice and have only two eggs \
left. The receipt says 37 euros and 45 cents, which is three euros more than last week, because olive oil \
has become more expensive. May I add rice, eggs and dish soap to the list for Saturday?

What is the difference between weight and mass? Mass says how much matter something has, and it is the \
same everywhere. Weight is the force with which a planet pulls on it. On the moon your mass would not \
change, but a scale there would show only about a sixth of what it shows at home. That is why astronauts \
could jump so high, even though their suits were heavy.

Stop at the door and knock twice. If nobody answers within a minute, leave the parcel on the mat, take a \
photograph and ring the bell once more. Never go in without being asked. When a dog barks, keep a distance \
of two metres and speak in a calm voice. Write down the time of the delivery, lock your box and drive on \
to the next address, which is number 16, third floor, the name on the bell is Novak.
"""


def sentences() -> list[str]:
    """What a user might say, for a model that answers: its sentences, those that are not too short."""
    whole = TEXT.replace("\n", " ")
    return [s for s in re.split(r"(?<=[.!?])[ ]+", whole) if len(s.split()) > 2]
