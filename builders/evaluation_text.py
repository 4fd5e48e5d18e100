"""The built-in text on which a build is measured when the user gives none. Written for this project: plain
English of the kind that a robot at home or in a warehouse hears and says. Never change a word of it: the
perplexities of older engines are stated on these bytes (its name below is stated with them).
"""

NAME = "builtin-robot-english-1"

TEXT = """\
Once upon a time there was a small robot named Pip. Pip lived in a big house with a girl named Anna and \
her brother Tom. Every morning Pip rolled into the kitchen, opened the curtains and said, "Good morning! \
It is a sunny day." Anna liked to play with Pip. One day she lost her red ball. She looked under the bed \
and behind the door, but she could not find it. She was very sad. "Do not cry," said Pip. "I will help \
you. Where did you play yesterday?" Anna thought for a while. "We played in the garden, near the old \
tree," she said. So they went to the garden together. The grass was wet and a little bird was singing. Pip \
looked up and saw something red between the leaves. "There it is!" he said. He lifted his long arm, took \
the ball and gave it to Anna. She was so happy that she gave Pip a big hug. Tom came out and laughed. "You \
are the best robot in the world," he said. From that day on, Anna always put her toys back in the box \
before she went to bed.

Please bring me the blue mug from the kitchen table. First check that the mug is empty. If there is still \
tea in it, carry it slowly and do not spill. Then go back to the kitchen and put the plates into the sink. \
When the sink is full, tell Tom that it is his turn to wash. After that, take the green bag from the chair \
and follow Anna to the front door. Wait there until she comes back.

The warehouse opens at seven. A mobile robot leaves its charger, drives to shelf twelve and scans the \
label on the second box. If the number matches the order, the arm picks the box up with both grippers and \
places it on the cart. If the box is too heavy, the robot stops, turns on its yellow light and asks a \
person for help. It must never lift a box while someone stands within one metre of the arm. At noon the \
batteries are low, so the robots return to their docks one after another and rest for half an hour. In the \
evening the last cart is checked, the floor is swept and the lights go out.

A good helper listens before it moves. When a person says "stop", it stops at once, whatever it was doing. \
When it did not understand, it says so and asks again instead of guessing. It remembers where things \
belong: cups in the cupboard, shoes by the door, books on the shelf. It tells the truth about what it has \
done, and what it has not done yet. "I put the milk in the fridge," it may say, "but I could not find the \
bread." Then the person knows what is left to do, and they can finish the work together.
"""
