// Asks for a key until one works or the person cancels; keeps it until the tab is closed.

import * as api from "./api.js";

const ask = document.getElementById("ask");

// Show the dialog; whether a key was given.
export async function askForKey(problem = "") {
  document.getElementById("ask-problem").textContent = problem;
  ask.returnValue = "";
  if (!ask.open) ask.showModal();
  await new Promise((resolve) => ask.addEventListener("close", resolve, { once: true }));
  if (ask.returnValue !== "use") return false;
  api.setKey(document.getElementById("ask-key").value.trim());
  return true;
}

export async function withKey(act) {
  for (;;) {
    try {
      return await act();
    } catch (error) {
      if (!(error instanceof api.Refused) || ![401, 403].includes(error.status)) throw error;
      const problem = error.status === 403 ? error.message : "That key was refused.";
      if (!(await askForKey(sessionStorage.getItem("key") ? problem : ""))) throw error;
    }
  }
}
