let reply = [..."one 🦉 two"]
const piece = {offset: 5, text: "!"}
//BLOCK
if (reply.join("") !== "one 🦉!") throw new Error(reply.join(""))
