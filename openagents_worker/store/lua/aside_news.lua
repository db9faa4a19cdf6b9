-- Entries that were put aside since the previous call, newest first, so that each is logged once. Returns entries
local said = tonumber(redis.call('GET', k.aside_said())) or 0
local news = {}
for _, entry in ipairs(redis.call('LRANGE', k.aside(), 0, limit - 1)) do
  local at_us = tonumber(string.match(entry, '^{"at_us":(%d+)')) or 0
  if at_us > said then news[#news + 1] = entry end
end
if news[1] then redis.call('SET', k.aside_said(), string.match(news[1], '^{"at_us":(%d+)'), 'PX', RUN_TTL_MS) end
return news
