-- Adds an unusable item to the list of dead letters, for operators. `key` is where it was found. Returns OK
aside().note(key, code, what, ',"item":' .. cjson.encode(item))
return 'OK'
