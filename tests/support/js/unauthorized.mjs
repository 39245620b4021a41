// The error of a submit with the key from $POINTING or from the environment.
import { failureOf, fal, instantInput, printResult } from "./sdk.mjs";

printResult(await failureOf(fal.queue.submit("test/null", { input: instantInput })));
