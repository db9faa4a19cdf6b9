-- Reads the same keys of many ids, for a list on a page: one command in place of one for each key. `kind` is what is read, `words` what it needs
-- besides the id: fields, or how many entries. Changes nothing. The answer for a key of a wrong type is an error. Returns a row of answers for each id
local SESSIONS = 'sessions'
local READ = {
  run = function(id) return {redis.pcall('HMGET', k.run(id), unpack(words))} end,
  facts = function(id) return {redis.pcall('HKEYS', k.facts(id))} end,
  session = function(id)
    return {redis.pcall('EXISTS', k.session(id)), redis.pcall('ZSCORE', k.index(SESSIONS), id), redis.pcall('HGET', k.session(id), 'holder'),
      redis.pcall('ZCARD', k.session_queue(id)), redis.pcall('LLEN', k.transcript(id)), redis.pcall('LLEN', k.artifacts(id))}
  end,
  worker = function(id) return {redis.pcall('SCARD', k.worker_runs(id)), redis.pcall('GET', k.worker_parts(id))} end,
  queue = function(id) return {redis.pcall('ZCARD', k.sent(id))} end,
  messages = function(id) return {redis.pcall('ZRANGE', k.sent(id), 0, words[1], 'WITHSCORES')} end,
  limit = function(id) return {redis.pcall('ZCARD', k.limit_queue(id)), redis.pcall('ZCARD', k.limit_calls(id))} end}

local rows = {}
for at, id in ipairs(ids) do rows[at] = READ[kind](id) end
return rows
