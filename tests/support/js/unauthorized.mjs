// A submit with whatever key the pointing or the environment has.
import { atOnce, fal, failureOf, say } from "./sdk.mjs";

say(await failureOf(fal.queue.submit("test/null", { input: atOnce })));
