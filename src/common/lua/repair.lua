#!lua flags=allow-oom
-- One page of the search for what no transition leaves behind, but someone else's XDEL, XTRIM, XACK, HDEL or XGROUP DELCONSUMER does.
-- KEYS 1 stream 2 index 3 starts 4 tries 5 due 6 dlq 7 open
-- ARGV 1 group 2 what to look through 3 cursor ('0' to begin) 4 about how many 5 mend: 1, or 0 to look only
-- -> {next cursor ('0': that was all), n x {what was found, email_id ('' if there is none), id or value, more}}
-- stream: LOST, delivered, yet nobody's and not waiting: handed back, as `release` does, with a higher delivery count than it ever had
--         STRAY, a mail known to no index: only named, with account, mailbox and internal_date; `adopt` mends it
-- index:  DANGLING, the entry or letter is gone and nobody holds it: only named; the mail is still in its mailbox, `publish` brings it again
-- due:    NOTHING_DUE, waits for its attempt without an entry: removed
-- starts, tries: MARK, of a mail that no index knows: removed
-- open:   MISCOUNT, unfinished and dead mails by the counters, and by the index: only named; `recount` mends it
--#include stands
--#include standing
local CONSUMER, LONG_AGO = 'audit', 86400000      -- ms idle: more than any lease
local AHEAD = 1000                                -- deliveries that left no mark: taken over again and again, and never begun
local walk, cursor, page, mend = ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5] == '1'
local answer = {'0'}

local function hand_back(sid, email_id)
  local started = string.match(redis.call('HGET', KEYS[3], email_id) or '', ':(%d+)$') or '0'
  local attempts, tried, first = string.match(redis.call('HGET', KEYS[4], email_id) or '0|0|', '^(%d+)|(%d+)|?(%d*)$')
  local count = string.format('%.0f', math.max(tonumber(started), tonumber(tried)) + AHEAD)
  redis.call('XCLAIM', KEYS[1], ARGV[1], CONSUMER, 0, sid, 'IDLE', LONG_AGO, 'RETRYCOUNT', count, 'FORCE', 'JUSTID')
  if redis.call('HEXISTS', KEYS[2], email_id) == 1 then                               -- so that a second loss finds a higher one
    redis.call('HSET', KEYS[4], email_id, attempts .. '|' .. count .. '|' .. first)
  end
end

if walk == 'stream' then
  local stand = standing(KEYS[1], ARGV[1], KEYS[5])
  local entries = redis.call('XRANGE', KEYS[1], cursor == '0' and '-' or '(' .. cursor, '+', 'COUNT', page)
  if #entries == page then answer[1] = entries[page][1] end
  for _, entry in ipairs(entries) do
    local sid, mail = entry[1], {}
    for i = 1, #entry[2], 2 do mail[entry[2][i]] = entry[2][i + 1] end
    local email_id = mail.email_id or ''
    if stand(sid, email_id) == 'lost' then
      answer[#answer + 1] = {'LOST', email_id, sid}
      if mend then hand_back(sid, email_id) end
    end
    if mail.schema and mail.email_id and mail.account and mail.mailbox and mail.internal_date and mail.record then
      local location = redis.call('HGET', KEYS[2], email_id)
      if not location or (location ~= 'S:' .. sid and not stands(KEYS[1], KEYS[6], location)) then
        answer[#answer + 1] = {'STRAY', email_id, sid, mail.account, mail.mailbox, mail.internal_date}
      end
    end
  end
elseif walk == 'index' then
  local found = redis.call('HSCAN', KEYS[2], cursor, 'COUNT', page)
  answer[1] = found[1]
  for i = 1, #found[2], 2 do
    local location = found[2][i + 1]
    if not stands(KEYS[1], KEYS[6], location) and not pending(KEYS[1], ARGV[1], string.sub(location, 3)) then
      answer[#answer + 1] = {'DANGLING', found[2][i], location}
    end
  end
elseif walk == 'due' then
  local found = redis.call('ZSCAN', KEYS[5], cursor, 'COUNT', page)
  answer[1] = found[1]
  for i = 1, #found[2], 2 do
    local sid, email_id = string.match(found[2][i], '^(%d+%-%d+)|(.*)$')
    if not sid or not stands(KEYS[1], KEYS[6], 'S:' .. sid) then
      answer[#answer + 1] = {'NOTHING_DUE', email_id or '', found[2][i]}
      if mend then redis.call('ZREM', KEYS[5], found[2][i]) end
    end
  end
elseif walk == 'starts' or walk == 'tries' then
  local marks = walk == 'starts' and KEYS[3] or KEYS[4]
  local found = redis.call('HSCAN', marks, cursor, 'COUNT', page)
  answer[1] = found[1]
  for i = 1, #found[2], 2 do
    if redis.call('HEXISTS', KEYS[2], found[2][i]) == 0 then
      answer[#answer + 1] = {'MARK', found[2][i], found[2][i + 1]}
      if mend then redis.call('HDEL', marks, found[2][i]) end
    end
  end
elseif walk == 'open' then
  local sum, known = 0, redis.call('HLEN', KEYS[2])
  for _, count in ipairs(redis.call('HVALS', KEYS[7])) do sum = sum + tonumber(count) end
  if sum ~= known then answer[2] = {'MISCOUNT', '', string.format('%.0f', sum), string.format('%.0f', known)} end
else
  return redis.error_reply('ERR there is no ' .. walk .. ' to look through')
end
return answer
