-- Keeps an item that nobody can use, for those who look after the deployment: `key` says where it was found. Returns OK
aside().note(key, code, what, ',"item":' .. cjson.encode(item))
return 'OK'
