// Ask for a key until one is good; it is kept until the tab is closed.

import * as api from "./api.js";

export async function withKey(act) {
  const ask = document.getElementById("ask");
  for (;;) {
    try {
      return await act();
    } catch (error) {
      if (!(error instanceof api.Refused) || ![401, 403].includes(error.status)) throw error;
      const refused = error.status === 403 ? error.message : "That key was refused.";
      document.getElementById("ask-problem").textContent = sessionStorage.getItem("key") ? refused : "";
      if (!ask.open) ask.showModal();
      await new Promise((resolve) => ask.addEventListener("close", resolve, { once: true }));
      api.setKey(document.getElementById("ask-key").value.trim());
    }
  }
}
