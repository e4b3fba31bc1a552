"""Closed-loop evaluation in simulators; without `local` nothing here imports JAX: simulators live apart.

suite           what a simulator offers: its tasks, how to make them, how many starts they have
metaworld       MetaWorld's tasks with a picture, a state of four numbers and an instruction; their scripted experts
libero          LIBERO's and LIBERO-PRO's tasks as openpi's client shows them
aloha_sim       gym-aloha's tasks as openpi's client shows them
gymnasium_env   any other environment with Gymnasium's interface
rendering       small pictures of a MuJoCo scene in a few milliseconds on a CPU

films           the video of an episode, written while it is played
rollouts        one episode, and what it needs of a simulator and of a policy
parallel        episodes in processes; who waits for actions is answered together
remote          a policy behind a server
local           a policy in this process, which does import JAX

saving          every episode on disk when it ends, and runs that go on
pictures        videos, strips and pages of filmed episodes
summary         what was found, for JSON
comparison      two policies over the same episodes
statistics      how sure a success rate is, and the difference of two
"""
